"""Corpora: from a source string to records with random access.

A source string names where the records come from, and optionally which of them:

=========================  =========================================================================================
``builtin:python_manual``  Python's own reference manual, 79 topics of real English: ``{"text"}``
``builtin:copy``           100,000 random lower-case words to write out again: ``{"source", "target"}``
``builtin:reverse``        the same, to write backwards
``text:PATH``              a file, a folder (read recursively) or a glob; a record a file: ``{"text"}``
``jsonl:FILE``             a JSON object a line, with the fields it has
``parquet:PATH``           a Parquet file, a folder or a glob; a record a row, with the columns that are asked for
``tfds:NAME[@SPLIT]``      a split of TensorFlow Datasets (``train`` if none is named), downloaded if it must be;
                           NAME may have a config and a version, or be the folder of a prepared data set. The table
                           of :mod:`lmx.text.tfds_fields` gives well-known ones the fields of the objectives.
``hf:NAME[@SPLIT]``        a split of the datasets library: a folder of ``save_to_disk``, or a name on the hub, which
                           may have a config: ``hf:nyu-mll/glue/sst2@validation``
``task:NAME[@SPLIT]``      a task as text to text, ``{"source", "target"}``: see :mod:`lmx.text.tasks`
``prepared:DIR[@SPLIT]``   what ``lmx data prepare`` wrote (``train`` if no split is named): already tokens
=========================  =========================================================================================

Files of text and JSON may be compressed (``.gz``, ``.xz``). A slice as in TFDS may follow: ``[:90%]``, ``[90%:]``,
``[100:200]``, ``[:-5]``. It counts characters over the concatenated files for ``text:``, records otherwise; ``[:90%]``
and ``[90%:]`` together are always the whole. Several sources mix: by weight, the share of each in the training rows,
``0.7*SOURCE + 0.3*SOURCE``, with spaces about the plus; or without weights, by their sizes
(:mod:`lmx.text.mixing`).
"""

import bisect
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from lmx.errors import DataError, nearest
from lmx.text import columns, readers
from lmx.text.prepared import PreparedDocuments, read_prepared
from lmx.text.readers import Record
from lmx.text.tasks import TaskRecords, find_task
from lmx.text.templates import Template, Viewed
from lmx.text.tfds_fields import tfds_fields

_READERS = {
    "builtin": readers.read_builtin,
    "text": readers.read_text,
    "jsonl": readers.read_jsonl,
    "parquet": columns.read_parquet,
    "tfds": readers.read_tfds,
    "hf": columns.read_hf,
    "prepared": read_prepared,
}
_KINDS = (*_READERS, "task")


class Source(Sequence[Record]):
    """Records by index.

    Attributes:
      spec: the source string.
      sources: what training mixes.
      weights: the part of each in the training rows, which sum to 1; empty where the source string has none.
      class_names: of each field that holds classes as numbers, their names in order, where the source knows them.
      prepared: the records as tokens, where they come so.
    """

    spec: str
    sources: tuple["Source", ...]
    weights: tuple[Fraction, ...]
    class_names: Mapping[str, tuple[str, ...]]
    prepared: PreparedDocuments | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the records come from, where they come from files."""
        return tuple(path for source in self.sources for path in source.files)


class Records(Source):
    """A run of the records of one corpus."""

    def __init__(self, spec: str, records: Sequence[Record], chosen: range | None = None):
        self.spec, self.sources, self.weights = spec, (self,), (Fraction(1),)
        self.class_names = getattr(records, "class_names", {})
        self._records = records
        self._chosen = range(len(records)) if chosen is None else chosen
        self.prepared = records if isinstance(records, PreparedDocuments) else None

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Record:
        return self._records[self._chosen[index]]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(getattr(self._records, "files", ()))


class Mixture(Source):
    """Several sources. As a sequence (to evaluate) it is all of them in order; training mixes them.

    Raises:
      DataError: they have classes of the same field by other names.
    """

    def __init__(self, spec: str, sources: Sequence[Source], weights: Sequence[float | Fraction] = ()):
        self.spec, self.sources = spec, tuple(sources)
        exact = [Fraction(weight) for weight in weights]
        self.weights = tuple(weight / sum(exact) for weight in exact)
        self.class_names = {}
        for source in sources:
            for field, names in source.class_names.items():
                if self.class_names.setdefault(field, names) != names:
                    raise DataError(
                        f"the sources of the mixture {spec!r} have other classes in field {field!r}: "
                        f"{', '.join(self.class_names[field])}; and {', '.join(names)}, in {source.spec!r}."
                    )
        self._starts = list(itertools.accumulate(map(len, sources), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        which = bisect.bisect_right(self._starts, index) - 1
        return self.sources[which][index - self._starts[which]]


def open_source(spec: str, fields: Sequence[str] = ("text",), tasks: Sequence[str] = ()) -> Source:
    """Opens a source string (see the module's docstring).

    Args:
      spec: the source string.
      fields: what every record must hold: a text or a number each.
      tasks: tasks of the user's own, as JSON objects (``data.tasks``).

    Raises:
      DataError: the string cannot be read, something is missing, empty or malformed, or a record lacks a field.
      LmxError: the package that reads the source is not installed.
    """
    weights, specs = zip(*split_mixture(spec), strict=True)
    sources = [_open_one(part, fields, tasks) for part in specs]
    if len(sources) == 1 and weights[0] is None:
        return sources[0]
    return Mixture(spec, sources, () if weights[0] is None else weights)


def split_mixture(spec: str) -> list[tuple[Fraction | None, str]]:
    """Weight and source string of each part of a mixture, or of the one source; the weights are all there or all None.

    Raises:
      DataError: some parts have a weight and others have none, or a weight is not a positive number.
    """
    terms = [term.strip() for term in re.split(r"\s\+\s", spec)]
    matches = [re.fullmatch(r"([0-9][0-9.eE-]*)\s*\*\s*(.+)", term, re.DOTALL) for term in terms]
    if not any(matches):
        return [(None, term) for term in terms]
    found = []
    for term, match in zip(terms, matches, strict=True):
        try:
            weight = float(match[1])
        except (TypeError, ValueError):
            weight = 0.0
        if not 0 < weight < math.inf:
            raise DataError(
                f"{term!r} in the mixture {spec!r} has no positive weight; write 0.7*SOURCE + 0.3*SOURCE, with spaces "
                "about the plus."
            )
        found.append((Fraction(match[1]), match[2]))
    return found


def source_names(spec: str) -> tuple[str, ...]:
    """A short name for each part of a mixture, or of the one source: what its metrics are called.

    The last part of a path without what follows a dot, or all of another source's name; a number follows where two
    would be the same.
    """
    names = []
    for _, part in split_mixture(spec):
        scheme, _, rest = part.partition(":")
        body = _split_slice(scheme, rest)[0].rpartition("#")[2]
        if scheme in ("text", "jsonl", "parquet"):
            body = body.rstrip("/").rpartition("/")[2].partition(".")[0]
        names.append(re.sub(r"[^\w@-]+", "_", body).strip("_") or scheme)
    return tuple(
        f"{name}_{names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)
    )


def _open_one(spec: str, fields: Sequence[str], tasks: Sequence[str]) -> Source:
    scheme, colon, rest = spec.partition(":")
    if not colon or scheme not in _KINDS:
        raise DataError(
            "a source is builtin:NAME, text:PATH, jsonl:FILE, parquet:PATH, tfds:NAME, hf:NAME, task:NAME or "
            f"prepared:DIR; there is no kind {scheme!r} (in {spec!r}){nearest(scheme, _KINDS)}"
        )
    if re.search(rf",\s*({'|'.join(_KINDS)}):", rest):
        raise DataError(f"{spec!r} joins sources with a comma; write SOURCE + SOURCE, with spaces about the plus.")
    body, cut = _split_slice(scheme, rest)
    try:
        records = _read_task(body, tasks) if scheme == "task" else _read(scheme, body, fields)
    except OSError as error:  # a folder without permission, a name that is too long
        raise DataError(f"the source {spec[:200]!r} cannot be read: {error.strerror or error}.") from error
    if len(records) == 0:
        raise DataError(f"the source {spec!r} is empty: it holds no text at all. Name a file or a split that does.")
    readers.check_fields(f"the first record of {spec!r}", records[0], fields)
    if isinstance(records, readers.TextFiles):
        return Records(spec, records.part(cut(records.characters, spec, "characters")) if cut else records)
    if isinstance(records, PreparedDocuments):
        return Records(spec, records.part(cut(len(records), spec, "documents")) if cut else records)
    return Records(spec, records, cut(len(records), spec, "records") if cut else None)


def _read(scheme: str, body: str, fields: Sequence[str]) -> Sequence[Record]:
    """All the records of one corpus, with the fields of the table where it has them."""
    records = _READERS[scheme](body, fields)
    known = tfds_fields(body) if scheme == "tfds" else {}
    templates = {name: Template(text) for name, text in known.items() if name in fields}
    return Viewed(records, templates) if templates else records


def _read_task(name: str, tasks: Sequence[str]) -> Sequence[Record]:
    """The records of a task; its source is opened with the fields that its templates read."""
    name, _, split = name.partition("@")
    task = find_task(name, tasks)
    paths = dict.fromkeys((*Template(task.input).paths, *Template(task.target).paths))
    return TaskRecords(open_source(task.spec(split), tuple(paths), tasks), task)


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
