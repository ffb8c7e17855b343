"""``lmx launch`` as one types it, and commands of engines that only take down how they were called."""

import os
import stat
from pathlib import Path

# Here, because it sets up logging as it is loaded, and absl's handler then closes a stream that is not that moment's
# standard error: within a test, pytest's own.
import submitit  # noqa: F401

from lmx.cli import main

ROOT = Path(__file__).parents[2]
CONFIG = f"{ROOT}/experiments/gpt2.py:tiny"
# What a shell, YAML and Kubernetes each would like to read as something else.
AWKWARD = '--config.data.train=text:it\'s $(HOME) "a"/*.txt'
NEEDS = {"slurm": [], "gke": ["--image", "registry/lmx:1", "--mount", "gs://bucket:/runs"], "skypilot": []}
NEEDS["skypilot"] = ["--mount", "gs://bucket:/runs"]


def arguments(engine, devices, *more):
    given = ["launch", engine, "--config", CONFIG, "--workdir", "/runs/one", "--devices", devices]
    return [*given, *NEEDS.get(engine, []), *more]


def launch(capsys, engine, devices, *more):
    """The job, and what is said of it."""
    status = main(arguments(engine, devices, *more))
    out, said = capsys.readouterr()
    assert status == 0, said
    return out, said


def refused(capsys, engine, devices, *more):
    """The one paragraph that says why not."""
    assert main(arguments(engine, devices, *more)) == 2
    out, said = capsys.readouterr()
    assert out == "" and said.startswith("error:") and "Traceback" not in said
    return " ".join(said.split())


def command(*more):
    return ["lmx", "train", "--config", CONFIG, "--workdir", "/runs/one", *more]


def fake(folder, monkeypatch, **scripts):
    """Puts shell scripts first on the path, under their names."""
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        path = folder / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
