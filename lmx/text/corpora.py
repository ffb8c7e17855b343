"""Corpora: from a source string to records with random access.

A source string names where the records come from, and optionally which of them:

=========================  =========================================================================================
``builtin:python_manual``  Python's own reference manual, 79 topics of real English: ``{"text"}``
``builtin:copy``           100,000 random lower-case words to write out again: ``{"source", "target"}``
``builtin:reverse``        the same, to write backwards
``text:PATH``              a file, a folder (read recursively) or a glob; a record a file: ``{"text"}``
``jsonl:FILE``             a JSON object a line, with the fields it has
``tfds:NAME[@SPLIT]``      a split of TensorFlow Datasets (``train`` if none is named), downloaded if it must be;
                           NAME may have a config and a version: ``tfds:tiny_shakespeare@validation``
=========================  =========================================================================================

Files may be compressed (``.gz``, ``.xz``). A slice as in TFDS may follow: ``[:90%]``, ``[90%:]``, ``[100:200]``,
``[:-5]``. It counts characters over the concatenated files for ``text:``, records otherwise; ``[:90%]`` and
``[90%:]`` together are always the whole. Several sources mix by weight, the share of each in the training rows:
``0.7*SOURCE + 0.3*SOURCE``, with spaces about the plus.
"""

import bisect
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path

from lmx.errors import DataError, nearest
from lmx.text import readers
from lmx.text.readers import Record

_READERS = {
    "builtin": readers.read_builtin,
    "text": readers.read_text,
    "jsonl": readers.read_jsonl,
    "tfds": readers.read_tfds,
}


class Source(Sequence[Record]):
    """Records by index. ``sources`` and ``weights`` (which sum to 1) are what training mixes."""

    spec: str
    sources: tuple["Source", ...]
    weights: tuple[float, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the records come from, where they come from files."""
        return tuple(path for source in self.sources for path in source.files)


class Records(Source):
    """A run of the records of one corpus."""

    def __init__(self, spec: str, records: Sequence[Record], chosen: range | None = None):
        self.spec, self.sources, self.weights = spec, (self,), (1.0,)
        self._records = records
        self._chosen = range(len(records)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Record:
        return self._records[self._chosen[index]]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(getattr(self._records, "files", ()))


class Mixture(Source):
    """Several sources. As a sequence (to evaluate) it is all of them in order; training mixes them by weight."""

    def __init__(self, spec: str, sources: Sequence[Source], weights: Sequence[float]):
        self.spec, self.sources = spec, tuple(sources)
        self.weights = tuple(weight / math.fsum(weights) for weight in weights)
        self._starts = list(itertools.accumulate(map(len, sources), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        which = bisect.bisect_right(self._starts, index) - 1
        return self.sources[which][index - self._starts[which]]


def open_source(spec: str, fields: Sequence[str] = ("text",)) -> Source:
    """Opens a source string (see the module's docstring).

    Args:
      spec: the source string.
      fields: what every record must hold: a text or a number each.

    Raises:
      DataError: the string cannot be read, something is missing, empty or malformed, or a record lacks a field.
      LmxError: ``tfds:`` without the package tensorflow-datasets.
    """
    terms = [term.strip() for term in re.split(r"\s\+\s", spec)]
    weighted = [re.fullmatch(r"([0-9][0-9.eE-]*)\s*\*\s*(.+)", term, re.DOTALL) for term in terms]
    if len(terms) == 1 and weighted[0] is None:
        return _open_one(terms[0], fields)
    weights = []
    for term, match in zip(terms, weighted, strict=True):
        try:
            weights.append(float(match[1]))
        except (TypeError, ValueError):
            weights.append(0.0)
        if not 0 < weights[-1] < math.inf:
            raise DataError(
                f"{term!r} in the mixture {spec!r} has no positive weight; write 0.7*SOURCE + 0.3*SOURCE, with spaces "
                "about the plus."
            )
    return Mixture(spec, [_open_one(match[2], fields) for match in weighted], weights)


def _open_one(spec: str, fields: Sequence[str]) -> Source:
    scheme, colon, rest = spec.partition(":")
    if not colon or scheme not in _READERS:
        raise DataError(
            "a source is builtin:NAME, text:PATH, jsonl:FILE or tfds:NAME; there is no kind "
            f"{scheme!r} (in {spec!r}){nearest(scheme, _READERS)}"
        )
    body, cut = _split_slice(scheme, rest)
    records = _READERS[scheme](body, fields)
    if len(records) == 0:
        raise DataError(f"the source {spec!r} is empty: it holds no text at all. Name a file or a split that does.")
    readers.check_fields(f"the first record of {spec!r}", records[0], fields)
    if isinstance(records, readers.TextFiles):
        return Records(spec, records.part(cut(records.characters, spec, "characters")) if cut else records)
    return Records(spec, records, cut(len(records), spec, "records") if cut else None)


class Slice:
    """``[start:stop]`` of a source: counts or percentages, as in TFDS."""

    _BOUND = re.compile(r"(-?)(\d[\d_]*(?:\.\d+)?)(%?)")

    def __init__(self, text: str):
        self.text = text
        bounds = [bound.strip() for bound in text.split(":")]
        if len(bounds) != 2 or not all(self._is_bound(bound) for bound in bounds):
            raise DataError(
                f"the slice [{text}] cannot be read; write [start:stop] with counts or percentages up to 100%, such as "
                "[:90%], [90%:], [100:200] or [:-5]."
            )
        self._start, self._stop = bounds

    def __call__(self, total: int, spec: str, unit: str) -> range:
        """The chosen part of ``total`` units; a DataError where it is empty or reaches beyond them."""
        start = self._resolve(self._start, total, 0)
        stop = self._resolve(self._stop, total, total)
        if max(start, stop) > total:
            raise DataError(f"the slice [{self.text}] reaches beyond the {total:,} {unit} of {spec!r}.")
        if start >= stop:
            raise DataError(f"the slice [{self.text}] of {spec!r} is empty: it has {total:,} {unit}. Widen the slice.")
        return range(start, stop)

    def _is_bound(self, bound: str) -> bool:
        match = self._BOUND.fullmatch(bound)
        if bound == "" or match is None:
            return bound == ""
        return float(match[2]) <= 100 if match[3] else "." not in match[2]

    def _resolve(self, bound: str, total: int, default: int) -> int:
        if bound == "":
            return default
        minus, number, percent = self._BOUND.fullmatch(bound).groups()
        # Rounded, as TFDS does, so that [:x%] and [x%:] meet.
        count = round(float(number) * total / 100) if percent else int(number)
        return max(total - count, 0) if minus else count


def _split_slice(scheme: str, rest: str) -> tuple[str, Slice | None]:
    match = re.fullmatch(r"(.*)\[([^\[\]]*)\]", rest, re.DOTALL)
    if match is None or (scheme == "text" and ":" not in match[2]):  # a glob may end in a class: part[0-9]
        return rest, None
    return match[1], Slice(match[2])
