"""What is to run and where, checked before any engine hears of it: the config, the mesh, the machines, the names."""

import dataclasses
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from lmx.config import Config
from lmx.config_files import read_config_file
from lmx.errors import ConfigError, LmxError
from lmx.parallel.compile import check_strategy
from lmx.parallel.hardware import Devices, read_devices
from lmx.parallel.mesh import batch_shards, split_batch
from lmx.parallel.pipeline import check_pipeline
from lmx.parallel.sharding import Layout

COORDINATOR_PORT = 8476  # of process 0; any that is free on its machine would do
MAX_RESTARTS = 10
ASKED_TO_STOP = 128 + signal.SIGTERM  # exit status of a run that saved where it was: it goes on, however often
GRACE_SECONDS = 120  # for a run that is asked to stop to save where it is
NAME_LENGTH = 40  # engines add to it, and a host name ends at 63


@dataclasses.dataclass(frozen=True)
class Job:
    """``lmx train`` on machines.

    Attributes:
      name: of letters that every engine takes: a label of a host name.
      command: as one would type it, a word each.
      workdir: the command's.
      devices: what it runs on, a process a machine.
      max_restarts: times that it is started again after a failure; where it was asked to stop, it always is.
      environment: variables that every process has.
    """

    name: str
    command: tuple[str, ...]
    workdir: str
    devices: Devices
    max_restarts: int
    environment: Mapping[str, str]

    def __str__(self) -> str:
        devices = self.devices
        return (
            f"{self.name}: {devices.count} device(s) of {devices.hardware.name} on {devices.hosts} machine(s) of "
            f"{devices.chips_per_host} chip(s)"
        )


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A job in the form of an engine.

    Attributes:
      text: the file that the engine reads.
      suffix: of that file's name.
      checked: by what the text was checked, or why it was not.
    """

    text: str
    suffix: str
    checked: str


def make_job(
    config: str,
    overrides: Sequence[str],
    workdir: str,
    devices: str,
    name: str | None = None,
    environment: Sequence[str] = (),
    max_restarts: int = MAX_RESTARTS,
) -> Job:
    """A job whose config is valid and whose mesh fits the devices.

    Args:
      config, overrides, workdir: as ``lmx train`` takes them.
      devices: see :func:`lmx.parallel.hardware.read_devices`.
      name: none: after the config.
      environment: ``NAME=VALUE`` each.

    Raises:
      ConfigError: whatever of these is not so; nothing has been written.
    """
    read, asked = read_config_file(config, overrides), read_devices(devices)
    check_fits(read, asked)
    if name is None:
        name = re.sub(r"[^a-z0-9]+", "-", Path(config).name.replace(".py", "").lower()).strip("-")[:NAME_LENGTH]
    if not re.fullmatch(rf"[a-z]([-a-z0-9]{{0,{NAME_LENGTH - 2}}}[a-z0-9])?", name):
        raise ConfigError(f"--name {name!r} must be a-z, 0-9 and '-', from a letter, of at most {NAME_LENGTH}.")
    if max_restarts < 0:
        raise ConfigError(f"--max-restarts must be 0 or more, not {max_restarts}.")
    variables = dict(_variable(text) for text in environment)
    command = ("lmx", "train", "--config", config, "--workdir", workdir, *overrides)
    return Job(name, command, workdir, asked, max_restarts, variables)


def check_fits(config: Config, devices: Devices) -> None:
    """Raises :class:`ConfigError` where the run would find, once started, that its mesh does not fit the devices."""
    layout = Layout.abstract(config.mesh, devices.hardware, devices.count)
    check_strategy(config.train.strategy, layout.mesh)
    split = split_batch(config.train, layout.mesh)
    if not config.train.init_from:  # whose body may be another, and is known where it lies
        check_pipeline(config.model, split.rows_per_device, layout)
    shards = batch_shards(layout.mesh)
    if shards % devices.hosts and devices.hosts % shards:
        raise ConfigError(
            f"the mesh cuts a batch into {shards} parts, which {devices.hosts} machines cannot share evenly; let mesh "
            "data x fsdp x expert be a multiple or a divisor of the number of machines."
        )


def read_mounts(mounts: Sequence[str], workdir: str) -> dict[str, str]:
    """The source of each path of ``SOURCE:/PATH``, of which one must hold the workdir.

    Raises:
      ConfigError: a mount is not of that form, or the workdir would be lost with its machine.
    """
    found = {}
    for mount in mounts:
        source, colon, path = mount.rpartition(":")
        if not (source and colon and path.startswith("/") and not path.startswith("//")):
            raise ConfigError(f"--mount {mount!r} is not SOURCE:/PATH, as in gs://bucket:/runs or a-volume:/runs.")
        found[str(PurePosixPath(path))] = source
    place = PurePosixPath(workdir)
    if ".." in place.parts or not any(place.is_relative_to(path) for path in found):
        raise ConfigError(
            f"--workdir {workdir} is on none of the mounts ({', '.join(found) or 'there are none'}): a run would be "
            "lost with its machine. Mount a bucket or a volume that all machines share, as in --mount "
            "gs://bucket:/runs --workdir /runs/name."
        )
    return found


def run_tool(words: Sequence[str], text: str | None, purpose: str) -> str:
    """What an engine's command answers.

    Args:
      text: what it reads on its standard input.
      purpose: of the command, for the error.

    Raises:
      LmxError: it is not there, or says no.
    """
    if shutil.which(words[0]) is None:
        raise LmxError(f"{purpose} needs the command {words[0]!r}, which is not here; nothing was submitted.")
    done = subprocess.run(words, input=text, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip()
        raise LmxError(f"`{' '.join(words)}` failed with status {done.returncode}: {reason}")
    return done.stdout.strip()


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ConfigError(f"--env {text!r} is not NAME=VALUE.")
    return name, value
