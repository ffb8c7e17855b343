"""One run a workdir."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lmx.errors import CheckpointError
from lmx.training import lock
from lmx.training.lock import WorkdirLock

HOLDER = """
import sys, time
from lmx.training.lock import WorkdirLock
with WorkdirLock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_the_second_run_is_refused_and_told_who_holds_it(tmp_path):
    with WorkdirLock(tmp_path):
        with pytest.raises(CheckpointError, match=rf"another run is training in .* \(process {os.getpid()} on .*since"):
            WorkdirLock(tmp_path).__enter__()
    with WorkdirLock(tmp_path):  # free again
        pass


def test_the_lock_of_a_killed_process_is_none(tmp_path):
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(CheckpointError, match=f"process {process.pid} on"):
        WorkdirLock(tmp_path).__enter__()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert f"process {process.pid} on" in (tmp_path / ".lock").read_text()  # stale, and no hindrance
    with WorkdirLock(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()


def test_only_the_first_process_locks(tmp_path, monkeypatch):
    with WorkdirLock(tmp_path):
        monkeypatch.setattr("lmx.parallel.processes.is_first", lambda: False)
        with WorkdirLock(tmp_path):
            pass


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_workdir_that_cannot_be_written_is_said_to_be_so(tmp_path, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.os, "open", refuse)
    with pytest.raises(CheckpointError, match=rf"cannot be written \({os.strerror(number)}\).*another --workdir"):
        WorkdirLock(tmp_path).__enter__()


def test_a_file_system_without_locks_is_said_to_be_so(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with pytest.raises(CheckpointError, match="cannot be locked .*flock"):
        WorkdirLock(tmp_path).__enter__()
