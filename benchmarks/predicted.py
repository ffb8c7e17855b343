"""What `lmx plan` says of the training steps of `lmx bench --suite gpu`, and what they take on the card that is here.

    python -m benchmarks.predicted plan --devices h200:1 --json FILE    # with the extra `gpu`, and no card
    python -m benchmarks.predicted measure --json FILE                  # on the card
    python -m benchmarks.predicted show --json FILE                     # as a Markdown table

Each step is measured by a process of its own, whose memory is then its own, too. They all compile at once and run one
after the other. With `--profile` they print which operations cost most.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WARM, STEPS = 5, 15
GIB = 2**30


def training_cases() -> list:
    from lmx.benchmarking.cases import cases

    return [case for case in cases("gpu", "gpu") if case.kind == "training"]


def plan(name: str, devices: str) -> dict:
    """Bytes as compiled for a card that need not be there, and the seconds that a step takes at least."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from lmx.planning.plan import make_plan
    from lmx.planning.targets import open_target

    (config,) = (case.config for case in training_cases() if case.name == name)
    found = make_plan(config, open_target(devices))
    return {"bytes": found.memory.total, "seconds": found.times.step, "limit": found.times.limit, "devices": devices}


def measure(name: str, turn: Path, profile: bool) -> dict:
    """Bytes and seconds on the card. ``turn`` is a file, locked while this process runs steps."""
    import jax
    from rich.console import Console

    from lmx.benchmarking.batches import random_batch
    from lmx.parallel.sharding import put_batch
    from lmx.planning.program import compile_program
    from lmx.planning.targets import HERE, open_target
    from lmx.training.initial import initial_state

    (case,) = (case for case in training_cases() if case.name == name)
    program = compile_program(case.config, open_target(HERE))
    experiment = program.experiment
    shapes = {name: x.shape for name, x in program.batch.items()}
    with _locked(turn):
        state, _ = initial_state(experiment, experiment.optimizer(), None, Console(quiet=True))
        batch = put_batch(random_batch(case.config, shapes, case.documents), experiment.mesh)

        def step() -> float:
            nonlocal state
            start = time.perf_counter()
            state, metrics = program.compiled(state, batch)
            total, weight = jax.device_get(metrics["loss"])
            return time.perf_counter() - start

        before = jax.devices()[0].memory_stats()["peak_bytes_in_use"]  # of compiling, which tries kernels out
        seconds = [step() for _ in range(WARM + STEPS)][WARM:]
        stats = jax.devices()[0].memory_stats()
        costs = _costs(step, program.compiled.as_text()) if profile else {}
    flops = 3 * case.config.train.global_batch_size * experiment.row_tokens_and_flops()[1]
    return {
        "bytes": stats["peak_bytes_in_use"],
        "bytes before": before,
        "bytes as compiled": program.compiled.memory_analysis().peak_memory_in_bytes,
        "seconds": statistics.median(seconds),
        "flops": flops / statistics.median(seconds),
        "attention": "; ".join(map(str, experiment.attention_forms())),
        "compile": program.seconds,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "costs": costs,
    }


def _costs(step, text: str) -> dict[str, float]:
    """Milliseconds of a step by operation."""
    import jax

    from lmx.training.profiling import newest_trace, operation_costs

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(3):
                step()
        costs = operation_costs(newest_trace(Path(folder)), text)
    return {name: 1e3 * seconds / 3 for name, seconds in costs.most_common(40)}


@contextlib.contextmanager
def _locked(path: Path):
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def show(results: dict) -> None:
    """Prints a table of what was predicted and measured."""
    print("| step | planned, GiB | measured | ratio | step at least | measured | part of it |")
    print("|---|---|---|---|---|---|---|")
    for name, found in results.items():
        if {"plan", "measured"} <= set(found):
            planned, real = found["plan"], found["measured"]
            memory = (
                f"{planned['bytes'] / GIB:.2f} | {real['bytes'] / GIB:.2f} | {planned['bytes'] / real['bytes']:.2f}"
            )
            times = f"{1e3 * planned['seconds']:.0f} ms ({planned['limit']})"
            if "seconds" in real:
                measured = f"{1e3 * real['seconds']:.0f} ms | {planned['seconds'] / real['seconds']:.0%}"
            else:
                measured = "not alone on the card | –"
            print(f"| {name} | {memory} | {times} | {measured} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("plan", "measure", "show"))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--devices", default="h200:1")
    parser.add_argument("--only", default="", metavar="TEXT", help="only steps with this in their name")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:  # a child, which does one
        found = plan(args.only, args.devices) if args.which == "plan" else measure(args.only, args.turn, args.profile)
        args.json.write_text(json.dumps(found))
        return
    results = json.loads(args.json.read_text())["steps"] if args.json.is_file() else {}
    if args.which != "show":
        names = [case.name for case in training_cases() if args.only in case.name]
        kind = "plan" if args.which == "plan" else "measured"
        for name, found in _children(args, names):
            results.setdefault(name, {})[kind] = found
            _write(args.json, results)
            for what, cost in collections.Counter(found.get("costs", {})).most_common(12):
                print(f"{name}: {cost:8.2f} ms  {what}", flush=True)
    show(results)


def _children(args: argparse.Namespace, names: list[str]):
    """What each process found, in the order in which they end."""
    with tempfile.TemporaryDirectory() as folder:

        def child(number: int) -> dict:
            path = Path(folder) / f"{number}.json"
            command = [sys.executable, "-m", "benchmarks.predicted", args.which, "--only", names[number]]
            command += ["--json", str(path), "--devices", args.devices, "--turn", str(Path(folder) / "turn")]
            environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            subprocess.run(command + ["--profile"] * args.profile, check=True, env=environment)
            return json.loads(path.read_text())

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() if args.which == "measure" else 1) as pool:
            under_way = {pool.submit(child, number): name for number, name in enumerate(names)}
            for done in concurrent.futures.as_completed(under_way):
                try:
                    yield under_way[done], done.result()
                except subprocess.CalledProcessError:
                    print(f"{under_way[done]}: failed", file=sys.stderr, flush=True)


def _write(path: Path, results: dict) -> None:
    rows = []
    for name, found in results.items():
        for kind in found:
            rows += [
                {"name": f"{name}: {kind}, {of}", "value": found[kind][of], "unit": of}
                for of in ("bytes", "seconds")
                if of in found[kind]
            ]
    path.write_text(json.dumps({"rows": rows, "steps": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
