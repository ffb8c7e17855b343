"""``lmx launch``: a job in the form of an engine, written, and handed over when asked."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmx.errors import ConfigError, nearest
from lmx.launching import gke, skypilot, slurm
from lmx.launching.job import Job, Prepared
from lmx.training.workdir import write_text

ENGINES = {"slurm": slurm, "gke": gke, "skypilot": skypilot}


def given_options(engine: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments of a command line, those that are options of engines.

    Raises:
      ConfigError: there is no such engine, or an option is another's.
    """
    if engine not in ENGINES:
        raise ConfigError(f"{engine!r} is no engine{nearest(engine, ENGINES)}")
    of = {name: {field.name for field in dataclasses.fields(module.Options)} for name, module in ENGINES.items()}
    given = {name: value for name, value in arguments.items() if any(name in names for names in of.values())}
    for name in given.keys() - of[engine]:
        others = " and ".join(other for other, names in of.items() if name in names)
        raise ConfigError(f"--{name} is an option of {others}, not of {engine}.")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def prepare(engine: str, job: Job, options: Mapping[str, Any]) -> Prepared:
    """The job in the form of an engine, checked by what that engine has for it.

    Raises:
      ConfigError: the job is none that the engine can run, or an option is wrong.
      LmxError: a package that it takes is not installed.
    """
    return ENGINES[engine].prepare(job, ENGINES[engine].Options(**options))


def submit(engine: str, job: Job, options: Mapping[str, Any], prepared: Prepared) -> str:
    """Hands a prepared job over; returns what the engine answered.

    Raises:
      LmxError: the engine's command is not there, or says no.
    """
    return ENGINES[engine].submit(job, ENGINES[engine].Options(**options), prepared)


def write(output: str, job: Job, prepared: Prepared) -> Path:
    """Writes the engine's file; into a folder, under the job's name.

    Raises:
      ConfigError: there is no folder to write it in.
    """
    path = Path(output)
    if path.is_dir() or output.endswith("/"):
        path = path / (job.name + prepared.suffix)
    if not path.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {path.parent}; make it first.")
    write_text(path, prepared.text)
    return path
