"""One run a workdir: a lock that ends with the process that holds it, however that ends."""

import datetime
import fcntl
import os
import socket
from pathlib import Path
from typing import Any

from lmx.errors import CheckpointError
from lmx.parallel.processes import first_alone

LOCK_FILE = ".lock"


class WorkdirLock:
    """While open, no other run can train into ``workdir``. Of several processes of one run the first alone locks.

    The kernel holds the lock (``flock``) and lets go of it when the process is gone, killed or not. So the file that a
    dead run leaves behind locks nothing; what stands in it is only for the message.

    Raises:
      CheckpointError: on opening, in all processes: another run holds it, or the workdir cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike):
        self._workdir, self._file = Path(workdir), None

    def __enter__(self) -> "WorkdirLock":
        self._file = first_alone(self._lock)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _lock(self) -> int:
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            file = os.open(self._workdir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise CheckpointError(
                f"{self._workdir} cannot be written ({error.strerror}), and a run keeps everything there. Name another "
                "--workdir, or mend its permissions or its disk."
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            now = datetime.datetime.now().isoformat(" ", "seconds")
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}, since {now}\n".encode())
        except OSError as error:
            holder = os.read(file, 1000).decode(errors="replace").strip()
            os.close(file)
            raise self._refused(error, holder) from error
        return file

    def _refused(self, error: OSError, holder: str) -> CheckpointError:
        if isinstance(error, BlockingIOError):
            return CheckpointError(
                f"another run is training in {self._workdir} ({holder or 'it does not say which'}). Wait for it, stop "
                "it, or name another --workdir."
            )
        return CheckpointError(
            f"{self._workdir} cannot be locked ({error.strerror}). It must be on a disk that has room and knows flock; "
            "name another --workdir, or mount that one with locks."
        )
