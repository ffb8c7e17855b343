"""Documents that are there already: the very same (by hash), or nearly the same (by MinHash, Broder 1997).

Two documents are compared by the sets of their five-word shingles (as in Lee et al. 2022, section 4.2): 128 minima of
hashes of the set estimate the Jaccard similarity. Only documents that agree in all minima of a band are compared at all
(locality-sensitive hashing; Leskovec et al. 2020, section 3.4). The rule, the same wherever it runs:

* of documents with one hash, all but the first are dropped (``exact``);
* of those that are left, one is dropped (``near``) if in any bucket, which is a band with its minima, an earlier
  document stands first, and the two agree in at least ``similarity`` of all minima.

So nothing is compared in more than one place, and no graph of what is like what is held. A document that is like one
that was dropped is dropped with it.

Memory: two bytes a document, and one bucket file of about ``BUCKET_BYTES``. Disk, while it works: 512 bytes a document
for the minima, 16 for the hash, and 16 for each band (16 bands at a similarity of 0.8: 784 bytes a document in all).
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8, UInt32, UInt64

from lmx.errors import missing_extra
from lmx.preparation.ngrams import mixed, ngram_hashes

MINIMA, SHINGLE_WORDS, SEED = 128, 5, 1
BUCKET_BYTES = 1 << 26
ROWS_AT_ONCE = 1 << 15
EXACT, NEAR = 1, 2  # why a document is dropped; 0: it is kept

_ENTRY = np.dtype([("key", np.uint64), ("order", np.uint64)])
Keys = Callable[[int, int], UInt64[np.ndarray, "documents keys"]]


@dataclasses.dataclass(frozen=True)
class Bands:
    """How the minima are put into bands: ``count`` of them of ``rows`` minima each."""

    count: int
    rows: int

    @classmethod
    def of(cls, similarity: float) -> "Bands":
        """The longest bands with which documents just that similar still meet more often than not."""
        shapes = [cls(MINIMA // rows, rows) for rows in (32, 16, 8, 4, 2, 1)]
        return next((shape for shape in shapes if (1 / shape.count) ** (1 / shape.rows) <= similarity), shapes[-1])


def text_digest(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def minima(texts: Sequence[str]) -> UInt32[np.ndarray, "documents minima"]:
    """The MinHash signatures of texts, over shingles of words in lower case.

    Raises:
      LmxError: the package rensa is not installed.
    """
    try:
        from rensa import RMinHash
    except ImportError:
        raise missing_extra("rensa", "prepare", "finding near-duplicates") from None
    shingles, bounds = ngram_hashes([_lowered(text) for text in texts], SHINGLE_WORDS)
    found = RMinHash.digest_matrix_from_flat_token_hashes(shingles, bounds.astype(np.uint64), MINIMA, SEED)
    return np.array(found.to_rows(), np.uint32).reshape(len(texts), MINIMA)


def _lowered(text: str) -> bytes:
    """The text in lower case; as bytes it is much faster, and the same where all of it is ASCII."""
    return text.encode().lower() if text.isascii() else text.lower().encode()


def band_keys(
    signatures: UInt32[np.ndarray, "documents minima"], bands: Bands
) -> UInt64[np.ndarray, "documents bands"]:
    """A key for each band of each document, equal where all minima of the band are (and the band is the same)."""
    parts = signatures.reshape(len(signatures), bands.count, bands.rows).astype(np.uint64)
    keys = np.broadcast_to(np.arange(bands.count, dtype=np.uint64), parts.shape[:2])
    for row in range(bands.rows):
        keys = mixed(keys + parts[..., row])
    return keys


def alike(
    a: UInt32[np.ndarray, "*pairs minima"], b: UInt32[np.ndarray, "*pairs minima"], similarity: float
) -> Bool[np.ndarray, "*pairs"]:
    """For each pair of signatures, whether their estimated Jaccard similarity is at least ``similarity``."""
    return np.count_nonzero(a == b, axis=-1) >= similarity * MINIMA


class Column:
    """Fixed-size rows of all documents in the order of their parts, each part in a file of its own.

    Attributes:
      starts: the number of each part's first document, and of all documents.
    """

    def __init__(self, files: Sequence[Path], dtype: type, width: int):
        self._files, self._dtype, self._width = files, np.dtype(dtype), width
        sizes = [file.stat().st_size // (self._dtype.itemsize * width) for file in files]
        self.starts = np.cumsum([0, *sizes])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """The rows, some at a time, each with the number of its first."""
        row = self._dtype.itemsize * self._width
        for file, start, stop in zip(self._files, self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True):
            with file.open("rb") as content:
                for first in range(start, stop, ROWS_AT_ONCE):
                    chunk = content.read(min(ROWS_AT_ONCE, stop - first) * row)
                    yield first, np.frombuffer(chunk, self._dtype).reshape(-1, self._width)

    def __getitem__(self, orders: np.ndarray) -> np.ndarray:
        """The rows of documents by their number."""
        found = np.empty((len(orders), self._width), self._dtype)
        parts = np.searchsorted(self.starts, orders, side="right") - 1
        for part in np.unique(parts):
            chosen = parts == part
            # Mapped for this look only: what has been read of a mapped file counts as held.
            rows = np.memmap(self._files[part], self._dtype, "r").reshape(-1, self._width)
            found[chosen] = rows[orders[chosen] - self.starts[part]]
        return found


def find_duplicates(
    digests: Column, signatures: Column | None, bands: Bands, similarity: float, scratch: Path
) -> UInt8[np.ndarray, " documents"]:
    """Why each document is dropped: 0 (it is kept), ``EXACT`` or ``NEAR``.

    Args:
      digests: two 64-bit halves of each document's hash.
      signatures: each document's minima; none looks for equal documents only.
      bands, similarity: of near-duplicates.
      scratch: a folder for the buckets, which is there and empty; it is left empty.
    """
    dropped = np.zeros(len(digests), np.uint8)
    keys = ((first, halves[:, :1]) for first, halves in digests.chunks())
    for heads, others in _pairs(keys, len(digests), dropped, scratch):
        same = (digests[heads] == digests[others]).all(axis=-1)
        dropped[others[same]] = EXACT
    if signatures is None:
        return dropped
    keys = ((first, band_keys(rows, bands)) for first, rows in signatures.chunks())
    near = np.zeros(len(digests), bool)
    for heads, others in _pairs(keys, len(digests) * bands.count, dropped, scratch):
        new = ~near[others]
        heads, others = heads[new], others[new]
        near[others[alike(signatures[heads], signatures[others], similarity)]] = True
    dropped[near] = NEAR
    return dropped


def _pairs(
    keys: Iterator[tuple[int, np.ndarray]], total: int, dropped: np.ndarray, scratch: Path
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first document of each key, and each other one of it; those dropped before have no part in it.

    Entries are spilled by key into files that fit into memory, and sorted there.
    """
    count = -(-total * _ENTRY.itemsize // BUCKET_BYTES) or 1
    # Copied: the caller marks documents while it goes through the pairs.
    taken = dropped != 0
    files = [scratch / f"bucket-{number}" for number in range(count)]
    for first, rows in keys:
        orders = np.arange(first, first + len(rows), dtype=np.uint64)
        kept = ~taken[first : first + len(rows)]
        entries = np.empty((int(kept.sum()), rows.shape[1]), _ENTRY)
        entries["key"], entries["order"] = rows[kept], orders[kept, None]
        entries = entries.reshape(-1)
        bucket = entries["key"] % np.uint64(count)
        for number in np.unique(bucket).tolist():
            with files[number].open("ab") as file:
                entries[bucket == number].tofile(file)
    for file in filter(Path.exists, files):
        entries = np.fromfile(file, _ENTRY)
        file.unlink()
        entries = entries[np.argsort(entries["key"], kind="stable")]  # they came in order
        begins = np.flatnonzero(np.concatenate([[True], entries["key"][1:] != entries["key"][:-1]]))
        heads = np.repeat(entries["order"][begins], np.diff([*begins.tolist(), len(entries)]))
        others = np.flatnonzero(heads != entries["order"])
        for start in range(0, len(others), ROWS_AT_ONCE):
            chosen = others[start : start + ROWS_AT_ONCE]
            yield heads[chosen].astype(np.int64), entries["order"][chosen].astype(np.int64)
