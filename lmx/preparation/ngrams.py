"""Hashes of runs of words, with which texts are compared."""

import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt64

_FACTOR, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)  # odd, so that nothing is lost
_HALF = np.uint64(32)


def ngram_hashes(words: Sequence[bytes], n: int) -> UInt64[np.ndarray, " ngrams"]:
    """A 64-bit hash of every ``n`` words in a row, in order; of all the words together where they are fewer."""
    codes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
    n = min(n, len(words))
    hashes = np.zeros(len(words) - n + 1 if words else 0, np.uint64)
    for first in range(n):
        hashes = hashes * _FACTOR + codes[first : len(codes) - n + 1 + first]
    return mixed(hashes)


def mixed(hashes: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """The hashes with every bit spread over all others; different ones stay so."""
    hashes = (hashes ^ (hashes >> _HALF)) * _MIX
    return hashes ^ (hashes >> _HALF)
