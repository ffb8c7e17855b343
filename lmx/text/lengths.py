"""Records that are longer than a row: found before training, so that what is left out, split or cut is counted."""

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmx.errors import DataError
from lmx.text.corpora import Source
from lmx.text.packing import Progress
from lmx.text.readers import Record

PIECE = "piece of the record"  # the field of an example that says which one of its record it is


class FittedRecords(Sequence[Record]):
    """The examples of a source's records: none, one or several of each.

    Attributes:
      note: what is done to how many records, in words; empty where all of them fit.
    """

    def __init__(self, source: Source, rows: Sequence[int], too_long: str):
        """``rows`` that each record would fill; ``too_long`` is what is done to those of more than one (data.too_long).

        Raises:
          DataError: no record fits, and those that do not are left out.
        """
        rows = np.asarray(rows, np.int64)
        longer = rows > 1
        counts = {"drop": np.where(longer, 0, 1), "cut": np.ones_like(rows), "split": rows}[too_long]
        if not counts.any():
            raise DataError(f"every record of the source {source.spec!r} is too long for a row; raise data.length.")
        self._source, self._split = source, too_long == "split"
        self._records = np.repeat(np.arange(len(rows)), counts)
        self._pieces = np.arange(len(self._records)) - np.repeat(np.cumsum(counts) - counts, counts)
        done = {"drop": "left out", "cut": "cut", "split": f"split into {counts[longer].sum():,} examples"}[too_long]
        what = f"{longer.sum():,} of {len(rows):,} records of {source.spec} are too long and {done}"
        self.note = what if longer.any() else ""

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        record = self._source[int(self._records[index])]
        return {**record, PIECE: int(self._pieces[index])} if self._split else record


_fitted: "weakref.WeakKeyDictionary[Source, tuple[Any, FittedRecords]]" = weakref.WeakKeyDictionary()


def fitted_records(source: Source, objective: Any, too_long: str) -> FittedRecords:
    """The examples of a source by ``data.too_long`` ("drop", "split" or "cut"), remembered as long as it lives.

    Every record is tokenized once to find its length; long work shows its progress.

    Raises:
      DataError: no record fits, or one does not suit the objective.
    """
    held = _fitted.get(source)
    if held is None or held[0] is not objective:
        rows = np.empty(len(source), np.int64)
        with Progress(len(source), f"measuring {source.spec}") as progress:
            for index in range(len(source)):
                rows[index] = objective.rows(source[index])
                progress.advance(1)
        held = _fitted[source] = (objective, FittedRecords(source, rows, too_long))
    return held[1]
