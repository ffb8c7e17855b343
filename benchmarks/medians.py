"""Several runs of `lmx bench` as one table in Markdown: the median of each time, of each ratio, and the ratio's range.

    python benchmarks/medians.py benchmarks/results/bench_cpu_*.json

Runs on the same processor are taken together; each has columns of its own.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

PEERS = ("eager", "compiled")
Run = dict[str, dict]  # rows by name


def cells(work: str, runs: Sequence[Run]) -> str:
    """Of a piece of work that was compared: lmx's time, the best peer's and the ratio; empty where it was not done."""
    if not all(f"{work}: ratio" in run for run in runs):
        return " | | "
    ours = statistics.median(run[f"{work}: lmx"]["value"] for run in runs)
    best = statistics.median(
        min(run[name]["value"] for peer in PEERS if (name := f"{work}: {peer}") in run) for run in runs
    )
    return f"{ours:.3g} s | {best:.3g} s | {told(f'{work}: ratio', runs)}"


def told(name: str, runs: Sequence[Run]) -> str:
    """The median of a ratio and its range."""
    ratios = [run[name]["value"] for run in runs]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="what --json wrote")
    by_processor: dict[str, list[Run]] = {}
    for path in parser.parse_args().runs:
        found = json.loads(path.read_text())
        by_processor.setdefault(found["machine"]["processor"], []).append({row["name"]: row for row in found["rows"]})
    print(f"| work | {' | '.join(f'{name}: lmx | best peer | ratio' for name in by_processor)} | goal |")
    print(f"|---|{'---|---|---|' * len(by_processor)}---|")
    machines = by_processor.values()
    rows = {name: row for runs in machines for name, row in runs[0].items()}
    for name, row in rows.items():
        goal = row.get("goal")
        if name.endswith(": ratio"):
            work, least = name.removesuffix(": ratio"), "" if goal is None else f"≥ {goal:.3g}"
            print(f"| {work} | {' | '.join(cells(work, runs) for runs in machines)} | {least} |")
        elif " to " in name and goal:
            print(f"| {name} | {' | '.join(f' | | {told(name, runs)}' for runs in machines)} | ≤ {goal:.3g} |")


if __name__ == "__main__":
    main()
