"""Several runs of `lmx bench` as one table in Markdown: the median of each time, of each ratio, and the ratio's range.

python benchmarks/medians.py benchmarks/results/bench_cpu_*.json
"""

import argparse
import json
import statistics
from pathlib import Path

PEERS = ("eager", "compiled")


def line(work: str, runs: list[dict[str, dict]]) -> str:
    """A row of the table, of a piece of work that every run compared."""
    ratios = [run[f"{work}: ratio"]["value"] for run in runs]
    ours = statistics.median(run[f"{work}: lmx"]["value"] for run in runs)
    best = statistics.median(
        min(run[name]["value"] for peer in PEERS if (name := f"{work}: {peer}") in run) for run in runs
    )
    return row(work, f"{ours:.3g} s", f"{best:.3g} s", ratios, runs[0][f"{work}: ratio"].get("goal"), "≥")


def row(work: str, ours: str, other: str, ratios: list[float], goal: float | None, sense: str) -> str:
    """The cells of a row, joined."""
    told = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
    return f"| {work} | {ours} | {other} | {told} | {'' if goal is None else f'{sense} {goal:.3g}'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="what --json wrote")
    runs = [{one["name"]: one for one in json.loads(path.read_text())["rows"]} for path in parser.parse_args().runs]
    print("| work | lmx | best peer | ratio | goal |\n|---|---|---|---|---|")
    for name, found in runs[0].items():
        if name.endswith(": ratio"):
            print(line(name.removesuffix(": ratio"), runs))
        elif " to " in name and found.get("goal"):
            print(row(name, "", "", [run[name]["value"] for run in runs], found["goal"], "≤"))


if __name__ == "__main__":
    main()
