"""A small trained run, made once a worker by the command that the README gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "experiments" / "quickstart.py:tiny")


def lmx(*arguments, check=True, timeout=300, **options):
    """Runs ``python -m lmx`` as a user would; returns the finished process."""
    options.setdefault("env", {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"})
    done = subprocess.run(
        [sys.executable, "-m", "lmx", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        **options,
    )
    assert not check or done.returncode == 0, done.stderr + done.stdout
    return done


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The workdir of quickstart's tiny variant, trained to its end."""
    workdir = tmp_path_factory.mktemp("runs") / "quickstart"
    lmx("train", "--config", QUICKSTART, "--workdir", workdir)
    return workdir
