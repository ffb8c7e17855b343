"""Is a run that is killed again and again, to the bit, the run that is not?

    python -m benchmarks.kills [--kills 50] [--steps 200] [--json FILE]

Trains the quickstart's model twice: in one go, and killed (SIGKILL) at random moments, each time after a few more
steps, and started again by the same command. Then compares parameters, optimizer state and metrics.jsonl, all but the
timings. After every kill metrics.jsonl is read as it was left: each line whole, each step once.

A third run is killed twice and goes on with other devices (1, 4, 2) and other loader workers (0, 2, 0). Its batches
must be the same; its losses the same but for the order in which float32 numbers are added up.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = (
    "model.dropout=0.1",
    "data.length=64",
    "train.global_batch_size=8",
    "train.log_every=1",
    "train.checkpoint_every=2",
    "train.samples=0",
    "eval.max_batches=2",
)
MACHINES = ((1, 0), (4, 2), (2, 0))  # devices and loader workers


class Life:
    """One process of a run.

    Args:
      workdir: of the run.
      settings: of the config.
      devices: fake ones.
      record: where the checksum of every batch goes; none: nowhere.
    """

    def __init__(self, workdir: Path, settings: tuple[str, ...], devices: int = 1, record: Path | None = None):
        self.workdir, self._left = workdir, inode(workdir)
        command = (
            [sys.executable, "-m", "lmx"] if record is None else [sys.executable, __file__, "--record", str(record)]
        )
        command += ["train", "--config", str(ROOT / "experiments" / "quickstart.py:tiny"), "--workdir", str(workdir)]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "lmx-jax-cache-kills"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }
        self._output = tempfile.TemporaryFile(mode="w+")
        self._process = subprocess.Popen(
            [*command, *(f"--config.{setting}" for setting in settings)],
            cwd=ROOT,
            env=environment,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def reach(self, step: int, seconds: float = 600) -> float:
        """Waits until this process has written the line of a step; returns when that was."""
        end = time.monotonic() + seconds
        while inode(self.workdir) == self._left or last_step(self.workdir) < step:
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"step {step} was not reached: {self._said()}")
            time.sleep(0.002)
        return time.monotonic()

    def kill(self) -> float:
        """SIGKILL; returns when."""
        self._process.kill()
        self._process.wait()
        return time.monotonic()

    def finish(self) -> None:
        """Waits for the end of the run."""
        if self._process.wait(timeout=1800) != 0:
            raise RuntimeError(self._said())

    def _said(self) -> str:
        self._output.seek(0)
        return self._output.read()[-2000:]


def inode(workdir: Path) -> int | None:
    """Of metrics.jsonl, which each process writes anew when it begins; None where there is none."""
    path = workdir / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else None


def last_step(workdir: Path) -> int:
    """The step of the last line of metrics.jsonl; -1 where there is none."""
    try:
        lines = (workdir / "metrics.jsonl").read_bytes().splitlines()
        return json.loads(lines[-1])["step"] if lines else -1
    except (FileNotFoundError, ValueError):  # the latter: read while a line is being written
        return -1


def check_lines(workdir: Path) -> None:
    """Raises where a line of metrics.jsonl is torn, or a step stands there twice."""
    text = (workdir / "metrics.jsonl").read_text()
    steps = [json.loads(line)["step"] for line in text.splitlines()]
    if not text.endswith("\n") or steps != sorted(set(steps)):
        raise AssertionError(f"metrics.jsonl holds {steps} and ends with {text[-80:]!r}")


def killed(workdir: Path, settings: tuple[str, ...], steps: int, kills: int, seed: int) -> dict[str, list[float]]:
    """Trains through kills; returns for each the seconds until the run was again where it was, and how it was hit."""
    draw, found = random.Random(seed), {"seconds": [], "redone": [], "saving": []}
    died, regained = None, -1
    for left in range(kills, 0, -1):
        life = Life(workdir, settings)
        if died is not None:
            found["seconds"].append(life.reach(regained) - died)
        start = max(regained, 0)
        few = max(1, round((steps - start) / (left + 1)))
        life.reach(min(start + draw.randint(1, max(1, 2 * few - 1)), steps - 1))
        time.sleep(draw.uniform(0, 0.3))
        died = life.kill()
        check_lines(workdir)
        regained = last_step(workdir)
        folders = [path.name for path in (workdir / "checkpoints").iterdir()]
        found["saving"].append(float(any("tmp" in name for name in folders)))
        found["redone"].append(regained - max((int(name) for name in folders if name.isdigit()), default=0))
        print(f"kill {kills - left + 1} after step {regained}, {found['redone'][-1]} steps lost", flush=True)
    life = Life(workdir, settings)
    found["seconds"].append(life.reach(regained) - died)
    life.finish()
    return found


def differences(left: Path, right: Path) -> dict[str, int]:
    """Arrays of the last checkpoints, and lines of metrics.jsonl without timings, that are not equal bit for bit."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from lmx.training.metrics import TIMINGS, read_metrics

    found = {}
    for item in ("params", "optimizer"):
        with ocp.StandardCheckpointer() as checkpointer:
            trees = [checkpointer.restore(newest(workdir) / item) for workdir in (left, right)]
        a, b = ([np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in trees)
        found[item] = abs(len(a) - len(b)) + sum(x.tobytes() != y.tobytes() for x, y in zip(a, b, strict=False))
    a, b = (
        [{name: line[name] for name in line if name not in TIMINGS} for line in read_metrics(workdir)]
        for workdir in (left, right)
    )
    found["metrics.jsonl"] = abs(len(a) - len(b)) + sum(x != y for x, y in zip(a, b, strict=False))
    return found


def newest(workdir: Path) -> Path:
    """The newest checkpoint."""
    return max((p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


def moved(workdir: Path, settings: tuple[str, ...], steps: int, record: Path) -> None:
    """Trains on one machine after the other, killed on each but the last."""
    for index, (devices, workers) in enumerate(MACHINES):
        life = Life(workdir, (*settings, f"data.num_workers={workers}"), devices, record)
        if index < len(MACHINES) - 1:
            life.reach(steps * (index + 1) // len(MACHINES))
            life.kill()
        else:
            life.finish()


def other_batches(left: Path, right: Path) -> int:
    """How many steps had other batches; each may have been recorded more than once."""
    seen: list[dict[int, set[str]]] = []
    for path in (left, right):
        seen.append({})
        for line in path.read_text().splitlines():
            index, checksum = line.split()
            seen[-1].setdefault(int(index), set()).add(checksum)
    return sum(len(seen[0].get(index, set()) | seen[1][index]) != 1 for index in seen[1])


def largest_difference(left: Path, right: Path) -> float:
    """Of the training losses, relative."""
    from lmx.training.metrics import read_metrics

    pairs = zip(read_metrics(left), read_metrics(right), strict=True)
    return max(abs(a["train/loss"] / b["train/loss"] - 1) for a, b in pairs if a["step"])


def record(path: str, arguments: list[str]) -> int:
    """Runs a command of lmx that also writes down the checksum of every batch it trains on."""
    from lmx.cli import main as lmx
    from lmx.training.experiment import Experiment

    train_batches = Experiment.train_batches

    class Recorded:
        def __init__(self, batches: Any):
            self._batches = batches
            self.get_state, self.set_state = batches.get_state, batches.set_state

        def __next__(self) -> dict:
            batch = next(self._batches)
            content = b"".join(name.encode() + batch[name].tobytes() for name in sorted(batch))
            with open(path, "a") as file:
                file.write(f"{self.get_state()['next_index']} {zlib.crc32(content):08x}\n")
            return batch

    Experiment.train_batches = lambda self: Recorded(train_batches(self))
    return lmx(arguments)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    settings = (*SETTINGS, f"train.steps={args.steps}", f"train.eval_every={max(1, args.steps // 4)}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        Life(root / "unbroken", settings, record=root / "batches").finish()
        found = killed(root / "killed", settings, args.steps, args.kills, args.seed)
        different = differences(root / "unbroken", root / "killed")
        moved(root / "moved", settings, args.steps, root / "moved_batches")
        batches = other_batches(root / "batches", root / "moved_batches")
        loss = largest_difference(root / "moved", root / "unbroken")
    seconds = sorted(found["seconds"])
    rows = [
        ("kills survived", args.kills, "kills", 50),
        *((f"{name}: not equal bit for bit", count, "arrays or lines", 0) for name, count in different.items()),
        ("kills while a checkpoint was being saved", sum(found["saving"]), "kills", None),
        ("steps done again, mean of a kill", sum(found["redone"]) / args.kills, "steps", None),
        ("time lost, median of a kill", seconds[len(seconds) // 2], "seconds", None),
        ("time lost, most of a kill", seconds[-1], "seconds", None),
        ("1, 4, 2 devices and 0, 2, 0 workers: other batches", batches, "steps", 0),
        ("1, 4, 2 devices and 0, 2, 0 workers: largest difference of a loss", loss, "relative", 1e-3),
    ]
    table = [
        {"name": name, "value": value, "unit": unit} | ({} if goal is None else {"goal": goal})
        for name, value, unit, goal in rows
    ]
    for row in table:
        print(f"{row['name']}: {row['value']:.6g} {row['unit']}")
    if args.json:
        contents = {"hardware": f"{os.cpu_count()} CPU cores", "steps": args.steps, "rows": table}
        Path(args.json).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    if any(different.values()) or batches:
        sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if sys.argv[1:2] == ["--record"]:
        sys.exit(record(sys.argv[2], sys.argv[3:]))
    main()
