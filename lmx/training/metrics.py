"""The numbers of a run: ``metrics.jsonl``, TensorBoard files, and how fast the hardware is used."""

import contextlib
import errno
import importlib.util
import json
import math
import mmap
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from lmx.errors import CheckpointError

METRICS_FILE = "metrics.jsonl"
TIMINGS = ("tokens_per_second", "model_flops_utilization", "input_wait")  # what no two runs have in common


class MetricsWriter:
    """Appends a line a step to ``metrics.jsonl``, and the same numbers to ``tensorboard/``.

    A line is written by one call of the system and within one page, whole or not at all: neither a kill nor a full disk
    tears it. Lines of a step that was lost (newer than the checkpoint that a run resumes from) and a last line torn by
    the machine's end are removed at opening, so every step stands once. Of several processes the first alone writes.

    Args:
      workdir: the run's folder.
      resume_step: the step that the run goes on from; 0 for a new one, which keeps nothing.

    Attributes:
      resumed: the lines kept from before, the same on every process.

    Raises:
      CheckpointError: an existing ``metrics.jsonl`` holds something else.
    """

    def __init__(self, workdir: str | Path, resume_step: int = 0):
        folder = Path(workdir)
        path, beside = folder / METRICS_FILE, folder / f"{METRICS_FILE}.tmp"
        lines = read_metrics(workdir) if resume_step and path.exists() else []
        self.resumed = [line for line in lines if line["step"] <= resume_step]
        self._file, self._tensorboard = None, None
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            beside.write_text("".join(map(_line, self.resumed)), encoding="utf-8")
            beside.replace(path)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
            self._tensorboard = _tensorboard(folder / "tensorboard", resume_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line. Train and eval metrics of the same step belong in one call.

        Args:
          step: updates made so far; greater than in the line before.
          metrics: numbers by name, ``train/loss`` or ``tokens_per_second``; device scalars are fetched.

        Raises:
          OSError: the disk is full; the file ends with the line before.
        """
        if self._file is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        self._append(_line({"step": int(step), **values}).encode())
        if self._tensorboard is not None and not _writes(self._tensorboard):
            print("No more TensorBoard files: they could not be written.")
            self._tensorboard = None
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def sync(self) -> None:
        """Returns when the lines are on disk, for a checkpoint that must not outlive them."""
        if self._file is not None:
            os.fsync(self._file)

    def _append(self, line: bytes) -> None:
        before = os.fstat(self._file).st_size
        room = mmap.PAGESIZE - before % mmap.PAGESIZE
        if room < len(line) <= mmap.PAGESIZE:  # between two pages of a call Linux ends a process that is killed
            line = b" " * room + line
        if os.write(self._file, line) < len(line):  # so much room was left
            os.ftruncate(self._file, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), METRICS_FILE)

    def close(self) -> None:
        """Closes both files."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._tensorboard is not None and _writes(self._tensorboard):
            with contextlib.suppress(OSError):  # of a full disk; what went wrong in the run matters more
                self._tensorboard.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def read_metrics(workdir: str | Path) -> list[dict[str, float]]:
    """The lines of a run's ``metrics.jsonl``, each with its ``step``; a torn last line is left out.

    Raises:
      CheckpointError: there is no such file, or a line before the last is no metrics line.
    """
    path = Path(workdir) / METRICS_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: {workdir} is no workdir of `lmx train`.")
    lines = []
    *whole, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")  # the last one has no line end: torn
    for number, text in enumerate(whole, start=1):
        try:
            line = json.loads(text)
            line["step"] = int(line["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"line {number} of {path} is no metrics line ({text[:60]!r}): mend or remove it."
            ) from error
        lines.append(line)
    return lines


class Throughput:
    """Tokens a second and model FLOPs utilization over the stretches between two readings.

    Args:
      flops_per_token: of the model, forward and backward (PaLM, appendix B); none reports no utilization.
      peak: the FLOP/s of all devices together; none reports no utilization.
    """

    def __init__(self, flops_per_token: float | None = None, peak: float | None = None):
        self._flops_per_token, self._peak = flops_per_token, peak
        self._tokens, self._running_since, self._seconds, self._waited = 0, time.perf_counter(), 0.0, 0.0

    def count(self, tokens: int) -> None:
        """Adds the tokens of a finished step."""
        self._tokens += tokens

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for input. The device may still be at work meanwhile, so it counts rather too much."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def pause(self) -> None:
        """Stops the clock: evaluations and checkpoints are no training time."""
        if self._running_since is not None:
            self._seconds += time.perf_counter() - self._running_since
            self._running_since = None

    def resume(self) -> None:
        """Starts the clock again after :meth:`pause`."""
        if self._running_since is None:
            self._running_since = time.perf_counter()

    def read(self) -> dict[str, float]:
        """``tokens_per_second``, ``input_wait`` (the fraction of the time spent waiting for a batch) and, where the
        peak is known, ``model_flops_utilization`` since the last reading; starts afresh."""
        self.pause()
        rate = self._tokens / self._seconds if self._seconds > 0 else math.nan
        wait = self._waited / self._seconds if self._seconds > 0 else math.nan
        self._tokens, self._seconds, self._waited = 0, 0.0, 0.0
        self.resume()
        found = {"tokens_per_second": rate, "input_wait": wait}
        if self._flops_per_token and self._peak:
            found["model_flops_utilization"] = rate * self._flops_per_token / self._peak
        return found


def _line(values: Mapping[str, float]) -> str:
    return json.dumps(values) + "\n"


def _writes(tensorboard: Any) -> bool:
    """Whether the thread that writes is there. An error ends it, and without it the next numbers wait without end."""
    return tensorboard.file_writer.event_writer._worker.is_alive()


def _tensorboard(folder: Path, resume_step: int) -> Any:
    """A TensorBoard writer, or None with one notice where the package is missing."""
    if importlib.util.find_spec("tensorboardX") is None:
        print("No TensorBoard files: the package tensorboardX is not installed (pip install tensorboardX).")
        return None
    with _as_if_missing("torch"):  # tensorboardX imports it where it is installed, for seconds, to name a type
        from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)


@contextlib.contextmanager
def _as_if_missing(package: str) -> Iterator[None]:
    """Importing ``package`` fails as if it were not installed, unless somebody has imported it already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None
    try:
        yield
    finally:
        del sys.modules[package]
