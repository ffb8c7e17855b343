"""Best fit: whole examples into as few rows as may be, apart from each other."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Example = Mapping[str, Any]

PREFIXES = ("", "encoder_", "decoder_")
NUMBERING = ("segments", "positions")

# Packed together: where only those that fit next are looked at, as in Grain's packers, more of a row stays empty.
EXAMPLES_AT_ONCE = 512


@dataclasses.dataclass(frozen=True)
class BestFit:
    """Packs examples into rows: longest first, each into the row that it leaves least room in (best-fit decreasing).

    Segments of a row number its examples 1, 2, … in their order, the same in all arrays; positions count from 0 in
    each. Rows stand in the order of their first examples, so that order stays as random as it was.

    Attributes:
      lengths: of a row, by array. No example has more in any.
    """

    lengths: Mapping[str, int]

    def __call__(self, examples: Sequence[Example]) -> list[Example]:
        """The rows, each with every array, unpadded."""
        names = [name for name in self.lengths if not name.endswith(NUMBERING)]
        sizes = np.array([[len(example[name]) for name in names] for example in examples])
        rows = fit(sizes, np.array([self.lengths[name] for name in names]))
        return [self._row([examples[i] for i in row], names) for row in rows]

    def _row(self, examples: Sequence[Example], names: Sequence[str]) -> Example:
        row = {name: np.concatenate([example[name] for example in examples]) for name in names}
        for prefix in (prefix for prefix in PREFIXES if f"{prefix}tokens" in row):
            sizes = [len(example[f"{prefix}tokens"]) for example in examples]
            row[f"{prefix}segments"] = np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes)
            row[f"{prefix}positions"] = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
        return row


def fit(sizes: np.ndarray, room: np.ndarray) -> list[list[int]]:
    """Which examples share a row.

    Args:
      sizes: [examples, arrays].
      room: [arrays], what a row holds.

    Returns:
      The indices of each row's examples, rising; rows by their first.
    """
    used = np.zeros_like(sizes)  # by row; there are no more rows than examples
    rows: list[list[int]] = []
    for index in np.argsort(-(sizes / room).max(axis=1), kind="stable").tolist():
        fits = (used[: len(rows)] + sizes[index] <= room).all(axis=1)
        if fits.any():
            best = int(np.where(fits, (used[: len(rows)] / room).sum(axis=1), -1).argmax())
        else:
            best = len(rows)
            rows.append([])
        used[best] += sizes[index]
        rows[best].append(index)
    return sorted(sorted(row) for row in rows)
