"""SkyPilot: a task in YAML, to be run as a managed job, which goes on elsewhere when its machines are taken away."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from lmx.errors import ConfigError
from lmx.launching.job import ASKED_TO_STOP, COORDINATOR_PORT, Job, Prepared, read_mounts, run_tool

# The images' own Python is older than lmx needs.
ENVIRONMENT = "~/lmx-env"
# Google's page "TPU software versions"; SkyPilot itself would take v5p's for v5e.
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
FIND_EACH_OTHER = f"""export JAX_COORDINATOR_ADDRESS="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{COORDINATOR_PORT}"
export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES"
export JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What ``lmx launch skypilot`` takes.

    Attributes:
      mount: ``SOURCE:/PATH`` each: a bucket (``gs://NAME``, ``s3://NAME``, …) or a SkyPilot volume, for the workdir.
      setup: lines of shell that install lmx, so that its command is found, from this folder, which is sent along;
        none: into a virtual environment of its own.
      infra: where to look, such as ``gcp/us-central1``; none: everywhere.
      spot: on machines that may be taken away.
    """

    mount: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    infra: str | None = None
    spot: bool = False


def prepare(job: Job, options: Options) -> Prepared:
    """The task.

    Raises:
      ConfigError: SkyPilot does not rent such devices, an option is none of its, or the workdir is on no mount.
    """
    text = yaml.dump(task(job, options), Dumper=_Dumper, sort_keys=False, width=1000)
    return Prepared(text, ".yaml", check(text))


def submit(job: Job, options: Options, prepared: Prepared) -> str:
    """Starts a managed job; returns what SkyPilot answered.

    Raises:
      LmxError: the command ``sky`` is not there, or says no.
    """
    with tempfile.NamedTemporaryFile("w", suffix=prepared.suffix, encoding="utf-8") as file:
        file.write(prepared.text)
        file.flush()
        words = ("sky", "jobs", "launch", "--yes", "--detach-run", "--name", job.name, file.name)
        return run_tool(words, None, "submitting to SkyPilot")


def check(text: str) -> str:
    """Checks a task as SkyPilot does when it reads one, where SkyPilot is installed.

    Raises:
      ConfigError: what SkyPilot says is wrong with it.
    """
    if importlib.util.find_spec("sky") is None:
        return "not checked: skypilot is not installed (lmx[launch])"
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it logs to where the job is to be
            import sky

            sky.Task.from_yaml_config(yaml.safe_load(text))
    except ValueError as error:  # SkyPilot's own errors of input are of this kind
        raise ConfigError(f"SkyPilot does not take the task: {error}") from error
    return f"checked by skypilot {importlib.metadata.version('skypilot')}'s schema"


def task(job: Job, options: Options) -> dict[str, Any]:
    """The task as plain data.

    Raises:
      ConfigError: as :func:`prepare`.
    """
    devices, mounts = job.devices, read_mounts(options.mount, job.workdir)
    if not devices.rented.skypilot:
        raise ConfigError(f"--devices {devices.name}: SkyPilot has no {devices.hardware.name}; use gke.")
    if not options.setup and not Path("setup.py").is_file():
        raise ConfigError(
            "SkyPilot sends this folder to the machines, to install lmx from, and there is no setup.py in it: run the "
            "command in lmx's own folder, or say with --setup how to install it."
        )
    tpu = devices.hardware.is_tpu
    name = devices.rented.skypilot.format(chips=devices.chips, cores=2 * devices.chips)
    resources: dict[str, Any] = {"accelerators": name if tpu else f"{name}:{devices.chips_per_host}"}
    if tpu:
        resources["accelerator_args"] = {"runtime_version": RUNTIMES[devices.hardware.name]}
    if options.infra:
        resources["infra"] = options.infra
    if options.spot:
        resources["use_spot"] = True
    resources["job_recovery"] = {"max_restarts_on_errors": job.max_restarts, "recover_on_exit_codes": [ASKED_TO_STOP]}
    run = shlex.join(job.command) + "\n"
    if not tpu and devices.hosts > 1:  # TPUs are told by their machines who the others are
        run = FIND_EACH_OTHER + run
    if not options.setup:
        run = f"source {ENVIRONMENT}/bin/activate\n" + run
    found: dict[str, Any] = {
        "name": job.name,
        "resources": resources,
        # A TPU topology is one node to SkyPilot, which runs the task on each of its machines.
        "num_nodes": 1 if tpu else devices.hosts,
        "workdir": ".",
        "setup": "\n".join(options.setup or _install("tpu" if tpu else "gpu")) + "\n",
        "run": run,
    }
    if job.environment:
        found["envs"] = dict(job.environment)
    buckets = {path: {"source": source, "mode": "MOUNT"} for path, source in mounts.items() if "://" in source}
    volumes = {path: source for path, source in mounts.items() if "://" not in source}
    return found | ({"file_mounts": buckets} if buckets else {}) | ({"volumes": volumes} if volumes else {})


def _install(extra: str) -> tuple[str, ...]:
    made = f"[ -d {ENVIRONMENT} ] || uv venv --python 3.12 --seed {ENVIRONMENT}"
    return "pip install uv", made, f'{ENVIRONMENT}/bin/pip install -e ".[{extra}]"'


class _Dumper(yaml.SafeDumper):
    """Writes lines of shell as they are."""


def _lines(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _lines)
