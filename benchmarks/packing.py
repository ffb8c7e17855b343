"""How full rows of source and target pairs are: best fit over many examples, and Grain's packers, a batch at a time.

    python benchmarks/packing.py [--json FILE]

The pairs are each sentence of Python's manual and the next, in bytes; rows hold 512 of each.
"""

import argparse
import json
import re

import grain
import numpy as np

from lmx.text.best_fit import EXAMPLES_AT_ONCE, fit
from lmx.text.corpora import open_source

ROOM = 512


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    sizes = pairs()
    found = {f"best fit, {EXAMPLES_AT_ONCE} examples": best_fit(sizes)}
    for packer in ("FirstFitPackIterDataset", "BestFitPackIterDataset"):
        for rows in (8, 32):
            found[f"Grain's {packer.removesuffix('PackIterDataset')}, {rows} rows"] = grains(packer, sizes, rows)
    rows = [{"name": name, "value": round(value, 4), "unit": "tokens a place"} for name, value in found.items()]
    for row in rows:
        print(f"{row['name']:>30}  {row['value']:.2%}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"rows": rows}, file, indent=1)


def pairs() -> np.ndarray:
    """Tokens of each source and target, with the end of the sentence."""
    manual = open_source("builtin:python_manual")
    sentences = [s for record in manual for s in re.split(r"(?<=[.!?])\s+", record["text"]) if 20 < len(s) < ROOM - 20]
    lengths = [len(sentence.encode()) + 1 for sentence in sentences]
    order = np.random.default_rng(0).permutation(len(lengths) - 1)
    return np.array(list(zip(lengths, lengths[1:], strict=False)))[order]


def best_fit(sizes: np.ndarray) -> float:
    parts = [sizes[start : start + EXAMPLES_AT_ONCE] for start in range(0, len(sizes), EXAMPLES_AT_ONCE)]
    return sizes.sum() / (sum(len(fit(part, np.array([ROOM, ROOM]))) for part in parts) * 2 * ROOM)


def grains(packer: str, sizes: np.ndarray, rows: int) -> float:
    def example(size: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.zeros(count, np.int32) for name, count in zip(("source", "target"), size, strict=True)}

    examples = grain.MapDataset.source(sizes).map(example).to_iter_dataset()
    settings = {"length_struct": {"source": ROOM, "target": ROOM}, "num_packing_bins": rows, "shuffle_bins": False}
    return sizes.sum() / (sum(1 for _ in getattr(grain.experimental, packer)(examples, **settings)) * 2 * ROOM)


if __name__ == "__main__":
    main()
