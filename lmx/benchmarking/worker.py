"""One system in a process of its own: it does what it is told, a line of JSON at a time.

So the threads of one library are not in the other's way, the systems can take turns at the same work, and each one's
memory is its own.
"""

import dataclasses
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmx.allocator import give_freed_memory_back, keep_freed_memory
from lmx.benchmarking.cases import PEERS, Case, cases
from lmx.benchmarking.work import Work

RESET_PEAK = "5"  # proc(5), clear_refs: the peak of resident memory starts afresh


@dataclasses.dataclass
class Worker:
    """A system, and the work that it has ready.

    Attributes:
      finish: gets ready for the work that has been begun, and ``seconds`` how long that took.
      peak_before: the peak of the device's memory when the work began.
    """

    system: str
    side: Any
    work: Work | None = None
    finish: Callable[[], Work] | None = None
    seconds: float = 0.0
    peak_before: float | None = None

    def prepare(self, suite: str, platform: str, name: str, folder: str) -> dict[str, Any]:
        """Begins a case by writing what all systems read."""
        start = time.perf_counter()
        self.finish = self.side.prepare(_case(suite, platform, name), Path(folder))
        self.seconds = time.perf_counter() - start
        return {}

    def open(self, suite: str, platform: str, name: str, folder: str) -> dict[str, Any]:
        """Gets a case ready and does it once."""
        start = time.perf_counter() - self.seconds
        if self.finish is None:
            self.work = self.side.open_work(_case(suite, platform, name), Path(folder), self.system)
        else:
            self.work = self.finish()
        self.finish, self.seconds = None, 0.0
        self._reset_peak()
        result = self.work.run()
        return {"result": result, "ready": time.perf_counter() - start, **self.work.facts}

    def run(self, first_token: bool) -> dict[str, list[float]]:
        """Seconds of one turn; if they are asked for and there is such a thing, of one up to the first token, too."""
        works = {"seconds": self.work.run}
        if first_token and self.work.first_token is not None:
            works["first_token"] = self.work.first_token
        return {name: [_seconds(work)] for name, work in works.items()}

    def profile(self, folder: str) -> dict[str, Any]:
        """The operations that cost most, and a trace in ``folder``."""
        return {"operations": self.side.profile(self.work, Path(folder))}

    def close(self) -> dict[str, Any]:
        """The most memory that was in use since the work began; none where an earlier case had as much in use."""
        peak = self.side.peak_memory()
        if peak is None:
            peak = resident_peak()
        elif peak == self.peak_before:
            peak = None
        self.work = None
        gc.collect()
        self.side.free_memory()
        return {"peak": peak}

    def _reset_peak(self) -> None:
        gc.collect()
        give_freed_memory_back()
        reset_peak()
        self.side.reset_peak()
        self.peak_before = self.side.peak_memory()

    def about(self) -> dict[str, Any]:
        """Versions, and what the system computes on."""
        return self.side.about()

    def matmul(self, size: int, dtype: str, times: int) -> dict[str, Any]:
        """FLOP/s of a matrix product, the best of some."""
        return {"rate": max(self.side.matmul_rate(size, dtype) for _ in range(times))}


def _seconds(work: Callable[[], float]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _case(suite: str, platform: str, name: str) -> Case:
    return next(case for case in cases(suite, platform) if case.name == name)


def reset_peak() -> None:
    """Lets the peak of this process's memory start from now, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    except OSError:
        pass


def resident_peak() -> float:
    """Most bytes of memory that this process has had since :func:`reset_peak`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Answers until its input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    keep_freed_memory()  # for the others, too
    system = sys.argv[1]
    worker = Worker(system, importlib.import_module(f"lmx.benchmarking.{'theirs' if system in PEERS else 'ours'}"))
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = getattr(worker, asked.pop("do"))(**asked)
        except Exception as error:  # the other systems and cases go on
            worker.work = None
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
