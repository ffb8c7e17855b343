"""The header of a GGUF file, checked before a library believes it (ggml-org/ggml, docs/gguf.md).

A count in it says how often to read on. The package ``gguf`` takes it as it is, and would count to 2^60.
"""

import struct
from pathlib import Path
from typing import BinaryIO

MAGIC, VERSIONS, MOST_DIMENSIONS = b"GGUF", (2, 3), 4
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of scalars, by their type's number
STRING, ARRAY = 8, 9
LEAST_FIELD, LEAST_TENSOR, LEAST_STRING = 13, 24, 8  # bytes
BLOCK = 256  # a quantized value takes more than 1/256 byte


def check_gguf(path: Path) -> None:
    """Raises a ValueError where a count or a length in the header is more than the file has room for."""
    size = path.stat().st_size
    with path.open("rb") as file:
        magic, version, tensors, fields = struct.unpack("<4sIQQ", _read(file, 24, size))
        if magic != MAGIC or version not in VERSIONS:
            raise ValueError(f"it begins with {magic!r} and version {version}, not {MAGIC!r} and 2 or 3")
        _check_room(fields * LEAST_FIELD + tensors * LEAST_TENSOR, file, size)
        for _ in range(fields):
            _skip_string(file, size)
            _skip_value(file, _number(file, size, 4), size)
        for _ in range(tensors):
            _skip_string(file, size)
            dimensions = _number(file, size, 4)
            if dimensions > MOST_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions} dimensions")
            elements = 1
            for _ in range(dimensions):
                elements *= _number(file, size, 8)
            kind, offset = _number(file, size, 4), _number(file, size, 8)
            if elements > BLOCK * size or offset > size:
                raise ValueError(f"a tensor of {elements:,} elements (type {kind}) at {offset:,} of {size:,} bytes")


def _skip_value(file: BinaryIO, kind: int, size: int) -> None:
    if kind == STRING:
        _skip_string(file, size)
    elif kind == ARRAY:
        inner, count = _number(file, size, 4), _number(file, size, 8)
        if inner in SIZES:
            _skip(file, count * SIZES[inner], size)
            return
        if inner != STRING:
            raise ValueError(f"an array of type {inner}")
        _check_room(count * LEAST_STRING, file, size)
        for _ in range(count):
            _skip_string(file, size)
    elif kind in SIZES:
        _skip(file, SIZES[kind], size)
    else:
        raise ValueError(f"a value of type {kind}")


def _skip_string(file: BinaryIO, size: int) -> None:
    _skip(file, _number(file, size, 8), size)


def _skip(file: BinaryIO, count: int, size: int) -> None:
    _check_room(count, file, size)
    file.seek(count, 1)


def _number(file: BinaryIO, size: int, width: int) -> int:
    return int.from_bytes(_read(file, width, size), "little")


def _read(file: BinaryIO, count: int, size: int) -> bytes:
    _check_room(count, file, size)
    return file.read(count)


def _check_room(count: int, file: BinaryIO, size: int) -> None:
    if count > size - file.tell():
        raise ValueError(f"{count:,} bytes are said to follow byte {file.tell():,} of {size:,}")
