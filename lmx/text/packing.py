"""Packing: documents of tokens into rows of a fixed length, none of them lost and none doubled."""

import dataclasses
import time
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int32, Int64

from lmx.errors import ConfigError, DataError
from lmx.text.corpora import Source
from lmx.text.tokenizers import Tokenizer

Row = dict[str, np.ndarray]

CHARACTERS_AT_ONCE = 1 << 20
SECONDS_BEFORE_PROGRESS = 2.0


@dataclasses.dataclass(frozen=True)
class Cut:
    """How documents become rows.

    Attributes:
      length: the most tokens of a row.
      overlap: tokens at the end of a row that the next row begins with (``split`` only). A row starts every
        ``length - overlap`` tokens, so each token is exactly once among the first so many of a row.
      split: True runs the documents together and cuts them wherever a row is full. False cuts a document only
        where it is longer than a row, and puts whole pieces together as long as the next one fits (next-fit).
      before, after: ids put before and after each document (``split``) or each piece of one.
      packing: False keeps to one document (``split``), or one piece, a row.
    """

    length: int
    overlap: int = 0
    split: bool = True
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    packing: bool = True

    def __post_init__(self):
        if self.overlap and not self.split:
            raise ConfigError("rows of whole pieces do not overlap: Cut.overlap goes with split=True only.")
        least = self.overlap if self.split else len(self.before) + len(self.after)
        if self.length <= least:
            raise ConfigError(
                f"rows of {self.length} tokens are too short: {least} of them are spent on "
                f"{'overlap' if self.split else 'special tokens'}. Raise data.length."
            )


class TokenStore:
    """All documents of a source, tokenized once.

    Attributes:
      tokens: the documents end to end.
      offsets: where each begins, and where the last one ends.
    """

    def __init__(self, tokens: Int32[np.ndarray, " tokens"], offsets: Int64[np.ndarray, " boundaries"]):
        self.tokens, self.offsets = tokens, offsets

    @classmethod
    def build(cls, source: Source, tokenizer: Tokenizer, field: str) -> "TokenStore":
        """Tokenizes ``field`` of every record; documents without tokens are left out. Long work shows its progress.

        What is prepared is read as it is, when its tokens are asked for.

        Raises:
          DataError: a record holds something other than text, or there are no tokens at all.
          ConfigError: what is prepared has the tokens of another tokenizer.
        """
        if source.prepared is not None:
            return cls(source.prepared.tokens(tokenizer), source.prepared.offsets)
        documents: list[np.ndarray] = []
        with Progress(len(source), f"tokenizing {source.spec}") as progress:
            for texts in _groups(source, field):
                documents += tokenizer.encode_batch(texts)
                progress.advance(len(texts))
        documents = [document for document in documents if len(document)]
        if not documents:
            raise DataError(f"the source {source.spec!r} has no tokens: field {field!r} is empty in every record.")
        offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
        return cls(np.concatenate(documents, dtype=np.int32), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def rows(self, cut: Cut) -> Sequence[Row]:
        """The rows by index. Each is ``tokens``, ``segments`` and ``positions``, int32 and of one length, unpadded.

        Segments number the documents (or pieces) of the row 1, 2, …; positions count from 0 in each.
        """
        return _WindowRows(self, cut) if cut.split else _PieceRows(self, cut)

    def sample(self, rng: np.random.Generator, length: int) -> Int32[np.ndarray, " length"]:
        """``length`` tokens in a row from a random place; fewer where the document ends. Never none."""
        place = int(rng.integers(len(self.tokens)))
        document = np.searchsorted(self.offsets, place, side="right") - 1
        begin, end = self.offsets[document : document + 2].tolist()
        start = max(begin, min(place, end - length))
        return self.tokens[start : min(start + length, end)]


_stores: "weakref.WeakKeyDictionary[Source, tuple[Tokenizer, str, TokenStore]]" = weakref.WeakKeyDictionary()


def token_store(source: Source, tokenizer: Tokenizer, field: str) -> TokenStore:
    """The store of a source, remembered as long as the source lives, since every evaluation asks for it again."""
    held = _stores.get(source)
    if held is None or held[0] is not tokenizer or held[1] != field:
        held = _stores[source] = (tokenizer, field, TokenStore.build(source, tokenizer, field))
    return held[2]


class _WindowRows(Sequence):
    """Windows of the stream of documents, each document with its ``before`` and ``after``."""

    def __init__(self, store: TokenStore, cut: Cut):
        self._store, self._cut = store, cut
        extra = len(cut.before) + len(cut.after)
        self._starts = store.offsets + extra * np.arange(len(store.offsets))  # of the documents in the stream
        stride = cut.length - cut.overlap
        if cut.packing:
            self._begins = np.arange(0, self._starts[-1], stride)
            self._ends = np.minimum(self._begins + cut.length, self._starts[-1])
        else:
            counts = -(-np.diff(self._starts) // stride)
            document = np.repeat(np.arange(len(store)), counts)
            within = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
            self._begins = self._starts[document] + stride * within
            self._ends = np.minimum(self._begins + cut.length, self._starts[document + 1])

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> Row:
        begin, end = int(self._begins[index]), int(self._ends[index])
        first = int(np.searchsorted(self._starts, begin, side="right")) - 1
        last = int(np.searchsorted(self._starts, end, side="left"))
        parts = []
        for document in range(first, last):
            start, stop = self._starts[document : document + 2].tolist()
            parts.append(self._part(document, max(begin - start, 0), min(end, stop) - start))
        return _row(parts)

    def _part(self, document: int, begin: int, end: int) -> np.ndarray:
        """Tokens ``begin`` to ``end`` of a document, counted with what stands before and after it."""
        before, after = self._cut.before, self._cut.after
        start, stop = self._store.offsets[document : document + 2].tolist()
        length = stop - start
        begin_inside, end_inside = (min(max(place - len(before), 0), length) for place in (begin, end))
        tokens = self._store.tokens[start + begin_inside : start + end_inside]
        tail = len(before) + length  # where ``after`` begins
        return _joined(before[begin:end], tokens, after[max(begin - tail, 0) : max(end - tail, 0)])


class _PieceRows(Sequence):
    """Whole pieces of documents, each with its ``before`` and ``after``, as many a row as fit."""

    def __init__(self, store: TokenStore, cut: Cut):
        self._store, self._cut = store, cut
        room = cut.length - len(cut.before) - len(cut.after)
        counts = -(-np.diff(store.offsets) // room)
        document = np.repeat(np.arange(len(store)), counts)
        within = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._begins = store.offsets[document] + room * within
        self._ends = np.minimum(self._begins + room, store.offsets[document + 1])
        self._rows = self._fit() if cut.packing else np.arange(len(document) + 1)

    def _fit(self) -> np.ndarray:
        """The first piece of each row, and the number of pieces: each row takes pieces in order while they fit."""
        sizes = self._ends - self._begins + len(self._cut.before) + len(self._cut.after)
        ends = np.cumsum(sizes)
        # If a row began with piece i, the next would begin with following[i]; only the chain from 0 is wanted.
        following = np.searchsorted(ends, ends - sizes + self._cut.length, side="right").tolist()
        firsts = [0]
        while firsts[-1] < len(sizes):
            firsts.append(following[firsts[-1]])
        return np.array(firsts)

    def __len__(self) -> int:
        return len(self._rows) - 1

    def __getitem__(self, index: int) -> Row:
        index = range(len(self))[index]
        pieces = range(int(self._rows[index]), int(self._rows[index + 1]))
        tokens = self._store.tokens
        inside = (tokens[self._begins[piece] : self._ends[piece]] for piece in pieces)
        return _row([_joined(self._cut.before, part, self._cut.after) for part in inside])


def _joined(before: Sequence[int], tokens: np.ndarray, after: Sequence[int]) -> np.ndarray:
    return np.concatenate([np.array(before, np.int32), tokens, np.array(after, np.int32)])


def _row(parts: Sequence[np.ndarray]) -> Row:
    return {
        "tokens": np.concatenate(parts),
        "segments": np.repeat(np.arange(1, len(parts) + 1, dtype=np.int32), [len(part) for part in parts]),
        "positions": np.concatenate([np.arange(len(part), dtype=np.int32) for part in parts]),
    }


def _groups(source: Source, field: str) -> Iterator[list[str]]:
    """The texts in lists of about a million characters, which tokenizers take faster than one by one."""
    texts, characters = [], 0
    for index in range(len(source)):
        text = source[index][field]
        if not isinstance(text, str):
            raise DataError(f"field {field!r} of record {index} of {source.spec!r} is {text!r}, where a text is due.")
        texts.append(text)
        characters += len(text)
        if characters >= CHARACTERS_AT_ONCE:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


class Progress:
    """A progress bar that appears when work has taken a while."""

    def __init__(self, total: int, title: str):
        self._total, self._title, self._done = total, title, 0
        self._start, self._bar = time.monotonic(), None

    def __enter__(self) -> "Progress":
        return self

    def advance(self, count: int) -> None:
        self._done += count
        if self._bar is None and time.monotonic() - self._start > SECONDS_BEFORE_PROGRESS:
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(stderr=True))
            self._task = self._bar.add_task(self._title, total=self._total)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()
