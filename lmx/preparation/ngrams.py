"""Hashes of runs of words, with which texts are compared."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, UInt64

_FACTOR, _MIX = 0x9E3779B97F4A7C15, np.uint64(0xD6E8FEB86659FD93)  # odd, so that nothing is lost
_HALF = np.uint64(32)
WORD = 64  # bytes of a word; a longer one counts as several
SPACE = ord(" ")
_MASKS = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)


def ngram_hashes(texts: Sequence[bytes], n: int) -> tuple[UInt64[np.ndarray, " ngrams"], Int64[np.ndarray, " texts+1"]]:
    """A 64-bit hash of every ``n`` words in a row of each text, in order; of all its words together if it has fewer.

    A word is what stands between spaces, line ends and other bytes up to 0x20; one that is very long is several.

    Returns:
      The hashes of all the texts, and where those of each begin and end.
    """
    words, firsts = _words(texts)
    counts = np.diff(firsts)
    hashes = _rolled(words, n)
    whole = np.ones(len(hashes), bool)  # within one text
    for first in firsts[1:-1].tolist():
        whole[max(first - n + 1, 0) : first] = False
    hashes, bounds = hashes[whole], _bounds(np.maximum(counts - n + 1, 0))
    is_short = (counts > 0) & (counts < n)
    if is_short.any():
        short = np.flatnonzero(is_short)
        together = [_rolled(words[firsts[i] : firsts[i + 1]], int(counts[i])) for i in short.tolist()]
        hashes = np.insert(hashes, bounds[short], np.concatenate(together))
        bounds[1:] += np.cumsum(is_short)
    return mixed(hashes), bounds


def mixed(hashes: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """The hashes with every bit spread over all others; different ones stay so."""
    hashes = (hashes ^ (hashes >> _HALF)) * _MIX
    return hashes ^ (hashes >> _HALF)


def _words(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of all the texts' words, and the number of each text's first, and of all."""
    starts, hashes = _word_hashes(b" ".join(texts))
    return hashes, np.searchsorted(starts, _bounds(np.array([len(text) + 1 for text in texts], np.int64)))


def _bounds(counts: np.ndarray) -> np.ndarray:
    """Where so many of each begin, one after the other, and where the last ones end."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _word_hashes(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Where words begin, and a hash of each; of all at once, eight bytes of each at a time."""
    inside = np.zeros(len(text) + 2, bool)
    np.greater(np.frombuffer(text, np.uint8), SPACE, out=inside[1:-1])
    edges = _cut(np.flatnonzero(inside[1:] != inside[:-1]))
    starts, lengths = edges[::2].copy(), edges[1::2] - edges[::2]
    # The eight bytes from any place on, though they begin anywhere.
    eight = np.ndarray(len(text) + 1, "<u8", text + bytes(8), strides=(1,))
    hashes = eight[starts] & _MASKS[np.minimum(lengths, 8)]
    longer = np.flatnonzero(lengths > 8)
    for done in range(8, WORD, 8):
        left = lengths[longer] - done
        longer, left = longer[left > 0], left[left > 0]
        hashes[longer] = mixed(hashes[longer]) + (eight[starts[longer] + done] & _MASKS[np.minimum(left, 8)])
    return starts, mixed(hashes)


def _cut(edges: np.ndarray) -> np.ndarray:
    """Where words begin and end, in turns; those of more than ``WORD`` bytes are cut into several."""
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    long = np.flatnonzero(lengths > WORD)
    cuts = (lengths[long] - 1) // WORD
    words, firsts = np.repeat(long, cuts), np.cumsum(cuts) - cuts
    places = starts[words] + WORD * (1 + np.arange(len(words)) - np.repeat(firsts, cuts))
    return np.insert(edges, np.repeat(2 * words + 1, 2), np.repeat(places, 2))


def _rolled(words: np.ndarray, n: int) -> np.ndarray:
    """For every ``n`` words in a row a polynomial of them, from those of half as many."""
    if n == 1 or len(words) < n:
        return words[: max(len(words) - n + 1, 0)]
    half = n // 2
    runs = _rolled(words, half)
    hashes = runs[:-half] * np.uint64(pow(_FACTOR, half, 2**64)) + runs[half:]
    return hashes[:-1] * np.uint64(_FACTOR) + words[n - 1 :] if n % 2 else hashes
