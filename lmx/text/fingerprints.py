"""Fingerprints of files: their size and a hash of every byte, and how to know cheaply that neither has changed.

A run that goes on with other data than it began with follows neither curve. Samples of a file's blocks would miss an
edit between them, and its time of modification is whatever the last tool that copied it set. So the whole file is
hashed, by blake2b: about 1 GB/s a core, several files at once. It is done once. What the kernel says of the file then
(inode, size, times of modification and of change) is kept beside the hash, and as long as it says the same the file is
not read again: every write moves the time of change, and no program can set it back.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lmx.errors import DataError

Fingerprint = dict[str, Any]

THREADS = min(8, os.cpu_count() or 1)  # hashing lets go of the interpreter's lock
SETTLED_SECONDS = 2  # file systems tell times in steps: a file that changed just now may change again unseen


def file_digest(path: str | os.PathLike) -> str:
    """The blake2b hash of a file's content, 128 bits in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def fingerprints(paths: Iterable[Path], known: Mapping[str, Fingerprint]) -> dict[str, Fingerprint]:
    """The fingerprint of every file by its path, each file once.

    Args:
      paths: the files.
      known: fingerprints taken earlier; those of files that have not been touched since are taken over.

    Returns:
      ``bytes``, ``blake2b``, and ``seen``, which says when the file need not be read again.

    Raises:
      DataError: a file cannot be read.
    """
    names = sorted({str(path) for path in paths})
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _fingerprint(name, known.get(name)), names), strict=True))


def changes(before: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint]) -> list[str]:
    """What differs, a phrase a file. The same content in the same order is the same data, wherever it lies now."""
    if [file["blake2b"] for file in before.values()] == [file["blake2b"] for file in now.values()]:
        return []
    found = [f"{name} is gone" for name in before if name not in now]
    found += [f"{name} is new" for name in now if name not in before]
    for name in before.keys() & now.keys():
        old, new = before[name], now[name]
        if old["bytes"] != new["bytes"]:
            found.append(f"{name} has {new['bytes']:,} bytes where it had {old['bytes']:,}")
        elif old["blake2b"] != new["blake2b"]:
            found.append(f"{name} has other content")
    return sorted(found)


def _fingerprint(name: str, known: Fingerprint | None) -> Fingerprint:
    try:
        status, now = os.stat(name), time.time()
        seen = [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        if known is not None and known["seen"] == seen:
            return dict(known)
        digest = file_digest(name)
    except OSError as error:
        raise DataError(f"the data file {name} cannot be read: {error.strerror or error}.") from error
    settled = status.st_ctime < now - SETTLED_SECONDS
    return {"bytes": status.st_size, "blake2b": digest, "seen": seen if settled else None}
