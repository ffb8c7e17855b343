"""Several runs of `lmx bench` as one table in Markdown: the median of each ratio, their range, and lmx's median time.

    python benchmarks/medians.py benchmarks/results/bench_cpu_*.json

Runs on the same processor are taken together; each has a column of its own.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

Run = dict[str, dict]  # rows by name


def cell(work: str, runs: Sequence[Run]) -> str:
    """Of a piece of work that was compared: the ratio and lmx's time; empty where it was not done."""
    ratio = told(f"{work}: ratio", runs)
    return ratio and f"{ratio}, {statistics.median(run[f'{work}: lmx']['value'] for run in runs):.3g} s"


def told(name: str, runs: Sequence[Run]) -> str:
    """The median of a ratio and its range; empty where it was not measured."""
    if not all(name in run for run in runs):
        return ""
    ratios = [run[name]["value"] for run in runs]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="what --json wrote")
    by_processor: dict[str, list[Run]] = {}
    for path in parser.parse_args().runs:
        found = json.loads(path.read_text())
        by_processor.setdefault(found["machine"]["processor"], []).append({row["name"]: row for row in found["rows"]})
    print(f"| work | goal | {' | '.join(by_processor)} |\n|---|---|{'---|' * len(by_processor)}")
    machines = by_processor.values()
    rows = {name: row for runs in machines for name, row in runs[0].items()}
    for name, row in rows.items():
        goal = row.get("goal")
        if name.endswith(": ratio"):
            work, least = name.removesuffix(": ratio"), "" if goal is None else f"≥ {goal:.3g}"
            print(f"| {work} | {least} | {' | '.join(cell(work, runs) for runs in machines)} |")
        elif " to " in name and goal:
            print(f"| {name} | ≤ {goal:.3g} | {' | '.join(told(name, runs) for runs in machines)} |")


if __name__ == "__main__":
    main()
