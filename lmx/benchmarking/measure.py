"""Systems take turns at the same work, and are timed."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lmx.benchmarking.cases import PEERS, Case
from lmx.errors import LmxError

ROUNDS = (3, 15)  # fewest and most turns
SECONDS = 6.0  # that the turns of one case may take, if the fewest do not take longer
MATMULS = {"cpu": ((2048, "float32"),), "gpu": ((8192, "bfloat16"),)}  # sizes and types of the measured peak


@dataclasses.dataclass(frozen=True)
class Timing:
    """One system at one case.

    Attributes:
      seconds: of every turn.
      first_token: of some turns, for generation.
      result: what the work gave the first time: a loss, or how many tokens.
      ready: seconds from the model's making to the end of its first turn.
      peak: most bytes of memory from the first turn on, of the process on a CPU, of the device elsewhere; none where an
        earlier case has hidden it.
      compile: seconds of it that compiling took, where that is done apart.
      flops: of a turn of lmx, where a formula tells.
    """

    seconds: list[float]
    first_token: list[float]
    result: float
    ready: float
    peak: float | None
    compile: float | None = None
    flops: float | None = None

    @property
    def median(self) -> float:
        """Seconds of a turn."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the slowest and the fastest of the middle half of the turns, by the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


@dataclasses.dataclass(frozen=True)
class Measured:
    """A case with all that was measured of it.

    Attributes:
      timings: by system.
      errors: of the systems that could not do it.
      operations: seconds of a turn in those of lmx's that cost most, if it was profiled.
    """

    case: Case
    timings: dict[str, Timing]
    errors: dict[str, str]
    operations: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def best_peer(self) -> tuple[str, Timing] | None:
        """The fastest of those that lmx is compared with, if any could do it."""
        peers = [(name, self.timings[name]) for name in PEERS if name in self.timings]
        return min(peers, key=lambda peer: peer[1].median, default=None)

    @property
    def flops(self) -> float | None:
        """Of one turn: what lmx counts is the same work for all."""
        return self.timings["lmx"].flops if "lmx" in self.timings else None

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the best peer lmx is."""
        if self.best_peer is None or "lmx" not in self.timings:
            return None
        return self.best_peer[1].median / self.timings["lmx"].median

    @property
    def to_twin(self) -> float | None:
        """How many times as long lmx takes as at the dense twin."""
        if not {"lmx", "twin"} <= self.timings.keys():
            return None
        return self.timings["lmx"].median / self.timings["twin"].median


class System:
    """A worker's end of the line."""

    def __init__(self, name: str):
        self.name = name
        command = [sys.executable, "-m", "lmx.benchmarking.worker", name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # of a GPU's memory, with the other systems
        self._process = subprocess.Popen(command, text=True, env=os.environ | shared, **pipes)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """What the worker answers.

        Raises:
          LmxError: it could not do it, or is gone.
        """
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise LmxError(f"the process of {self.name} ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise LmxError(answer["error"])
        return answer

    def end(self) -> None:
        """Ends the worker."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def systems(names: Sequence[str]) -> Iterator[dict[str, System]]:
    """Workers by name; one that cannot start is an error when it is asked."""
    started = {name: System(name) for name in names}
    try:
        yield started
    finally:
        for system in started.values():
            system.end()


def matmul_peak(workers: dict[str, System], platform: str) -> float:
    """The highest rate in FLOP/s at which any of the systems multiplies two large square matrices here."""
    rates = []
    for size, dtype in MATMULS[platform]:
        for worker in workers.values():
            with contextlib.suppress(LmxError):
                rates.append(worker.ask("matmul", size=size, dtype=dtype, times=5)["rate"])
    return max(rates)


def measure(
    suite: str,
    platform: str,
    case: Case,
    workers: dict[str, System],
    tell: Callable[[str], Any] = lambda text: None,
    profile: Path | None = None,
) -> Measured:
    """Lets all systems of a case take turns at it; one that fails is left out from then on.

    Their first turn each, after the one they get ready with, does not count: memory is still being had from the system
    then, and it is as much as half longer than the rest.

    On a GPU, whose host has cores to spare, they get ready at the same time. ``profile`` is where a folder for a trace
    of lmx's turns is made.
    """
    found: dict[str, dict[str, Any]] = {}
    errors: dict[str, str] = {}

    def ask(name: str, do: str, /, **arguments: Any) -> dict[str, Any]:
        try:
            return workers[name].ask(do, **arguments)
        except LmxError as error:
            errors[name] = str(error)
            return {}

    def take_turns(first_token: bool) -> dict[str, dict[str, list[float]]]:
        return {name: ask(name, "run", first_token=first_token) for name in found if name not in errors}

    with tempfile.TemporaryDirectory() as folder:
        where = {"suite": suite, "platform": platform, "name": case.name, "folder": folder}
        tell(f"{case.name}: getting ready")
        ask("lmx", "prepare", **where)
        with concurrent.futures.ThreadPoolExecutor(len(case.systems) if platform == "gpu" else 1) as pool:
            opened = list(pool.map(lambda name: {} if name in errors else ask(name, "open", **where), case.systems))
        for name, one in zip(case.systems, opened, strict=True):
            found[name] = {"seconds": [], "first_token": []} | one
        take_turns(first_token=True)
        start, (fewest, most) = time.perf_counter(), ROUNDS
        for turn in range(most):
            if turn >= fewest and time.perf_counter() - start > SECONDS:
                break
            tell(f"{case.name}: turn {turn + 1}")
            for name, taken in take_turns(first_token=turn < fewest).items():
                for field, seconds in taken.items():
                    found[name][field] += seconds
        operations = {}
        if profile is not None and "lmx" not in errors:
            traces = profile / case.name.replace(",", "").replace(" ", "_")
            traces.mkdir(parents=True, exist_ok=True)
            operations = ask("lmx", "profile", folder=str(traces)).get("operations", {})
        for name in [name for name in found if name not in errors]:
            found[name] |= ask(name, "close")
    timings = {name: Timing(**one) for name, one in found.items() if name not in errors}
    return Measured(case, timings, errors, operations)
