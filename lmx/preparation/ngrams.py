"""Hashes of runs of words, with which texts are compared."""

import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt64

_FACTOR, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)  # odd, so that nothing is lost
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))
_HALF = np.uint64(32)
PIECE = 1 << 16  # bytes that are looked at at once
SPACE = ord(" ")


def ngram_hashes(text: bytes, n: int) -> UInt64[np.ndarray, " ngrams"]:
    """A 64-bit hash of every ``n`` words in a row, in order; of all the words together where they are fewer.

    A word is what stands between spaces, line ends and other bytes up to 0x20.
    """
    words = np.concatenate([_word_hashes(piece) for piece in _pieces(text)] or [np.zeros(0, np.uint64)])
    n = min(n, len(words))
    hashes = np.zeros(len(words) - n + 1 if n else 0, np.uint64)
    for first in range(n):
        hashes = hashes * _FACTOR + words[first : len(words) - n + 1 + first]
    return mixed(hashes)


def mixed(hashes: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """The hashes with every bit spread over all others; different ones stay so."""
    hashes = (hashes ^ (hashes >> _HALF)) * _MIX
    return hashes ^ (hashes >> _HALF)


def _word_hashes(text: bytes) -> np.ndarray:
    """A hash of each word: a polynomial of its bytes, for all words at once by differences of one running sum."""
    letters = np.frombuffer(text, np.uint8)
    inside = np.zeros(len(letters) + 2, bool)
    np.greater(letters, SPACE, out=inside[1:-1])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[::2], edges[1::2]
    powers, inverses = _powers()
    sums = np.zeros(len(letters) + 1, np.uint64)
    np.cumsum(letters * powers[: len(letters)], out=sums[1:])
    return mixed((sums[ends] - sums[starts]) * inverses[starts])


@functools.cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """Powers of a factor and of its inverse, modulo 2^64, as many as a piece has bytes."""
    bases = (np.full(PIECE - 1, base) for base in (_FACTOR, _INVERSE))
    return tuple(np.cumprod(np.concatenate([[np.uint64(1)], base])) for base in bases)


def _pieces(text: bytes) -> Iterator[bytes]:
    """The text in pieces that end with a word where they can."""
    start = 0
    while len(text) - start > PIECE:
        stop = text.rfind(b" ", start, start + PIECE) + 1 or start + PIECE
        yield text[start:stop]
        start = stop
    if text[start:]:
        yield text[start:]
