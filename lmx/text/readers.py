"""Readers: all the records of one corpus, checked; :mod:`lmx.text.corpora` slices and mixes them."""

import glob
import gzip
import hashlib
import importlib
import itertools
import json
import lzma
import os
import random
import re
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lmx.errors import DataError, missing_extra, nearest
from lmx.paths import user_path

Record = Mapping[str, Any]

COMPRESSIONS = {".gz": gzip.open, ".xz": lzma.open}
TEXT_SUFFIXES = tuple(text + packed for text in (".txt", ".text", ".md", ".rst") for packed in ("", *COMPRESSIONS))
# Text is packed to a tenth or so; what unpacks to far more than that was made to fill the memory.
MOST_UNPACKED, MOST_RATIO = 1 << 26, 100
BUFFER = 1 << 20  # bytes read at once: a record in one piece
UNPACKING_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error, MemoryError)
SYNTHETIC_RECORDS = 100_000
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_fields(where: str, record: Any, fields: Sequence[str]) -> None:
    """Raises a DataError where a record is not an object that holds a text or a number in each of the fields.

    A field may be a path into what a field holds, ``answers[text][0]``.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where} is not an object with fields but {type(record).__name__}; each record is one object.")
    for name in fields:
        value = lookup(where, record, name)
        if not isinstance(value, str | int | float):
            raise DataError(f"field {name!r} of {where} is {value!r}, where a text or a number is due.")


def column(path: str) -> str:
    """The field that a path such as ``answers[text][0]`` begins with."""
    return path.partition("[")[0]


def lookup(where: str, record: Record, path: str) -> Any:
    """What a record holds at ``field`` or at a path ``field[key][0]``; a DataError where there is no such place."""
    name = column(path)
    if path in record:
        return plain(record[path])
    if name not in record:
        raise DataError(
            f"{where} has no field {name!r}{nearest(name, record)}. The fields to read are named by --field, or in a "
            "config's data section: text_field, pair_field, source_field, target_field, label_field."
        )
    value = record[name]
    for key in re.findall(r"\[([^\[\]]*)\]", path):
        try:
            value = value[key] if isinstance(value, Mapping) else value[int(key)]
        except (KeyError, IndexError, TypeError, ValueError):
            raise DataError(f"field {path!r} of {where}: there is no [{key}] in {value!r}.") from None
    return plain(value)


def plain(value: Any) -> Any:
    """Bytes made text, and a scalar of NumPy made Python's own."""
    value = value.item() if isinstance(value, np.generic) or getattr(value, "shape", None) == () else value
    return value.decode() if isinstance(value, bytes) else value


# builtin:


def read_builtin(name: str, fields: Sequence[str]) -> Sequence[Record]:
    """What comes with Python or is made from nothing."""
    if name not in _BUILTINS:
        raise DataError(f"there is no source 'builtin:{name}'{nearest(name, _BUILTINS)}")
    return _BUILTINS[name]()


class _PythonManual(Sequence):
    """The topics of Python's reference manual. Their text differs between Python versions."""

    def __init__(self):
        from pydoc_data import topics

        self.files, self._topics = (Path(topics.__file__),), topics.topics
        # By hash, so that a slice is a fair sample of the alphabet.
        self._names = sorted(self._topics, key=lambda name: hashlib.sha256(name.encode()).digest())

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        return {"text": self._topics[self._names[index]]}


class _Words(Sequence):
    """Random words of 3 to 12 lower-case letters and what becomes of them; each follows from its index alone."""

    def __init__(self, target: Callable[[str], str]):
        self._target = target

    def __len__(self) -> int:
        return SYNTHETIC_RECORDS

    def __getitem__(self, index: int) -> Record:
        generator = random.Random(index)  # whose stream is the same in every Python version
        word = "".join(chr(ord("a") + int(26 * generator.random())) for _ in range(3 + int(10 * generator.random())))
        return {"source": word, "target": self._target(word)}


def _same(word: str) -> str:
    return word


def _reversed(word: str) -> str:
    return word[::-1]


_BUILTINS: dict[str, Callable[[], Sequence[Record]]] = {
    "python_manual": _PythonManual,
    "copy": lambda: _Words(_same),
    "reverse": lambda: _Words(_reversed),
}


# text:


class TextFiles(Sequence):
    """One record a file, or a part of one; sliced by characters of the whole."""

    def __init__(self, texts: Sequence[str], files: Sequence[Path] = ()):
        self.files = tuple(files)
        self._texts = [text for text in texts if text]
        self.characters = sum(map(len, self._texts))

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Record:
        return {"text": self._texts[index]}

    def part(self, chosen: range) -> "TextFiles":
        """The characters from ``chosen.start`` to ``chosen.stop`` of the concatenated files."""
        starts = itertools.accumulate(map(len, self._texts), initial=0)
        return TextFiles(
            [
                text[max(chosen.start - start, 0) : max(chosen.stop - start, 0)]
                for text, start in zip(self._texts, starts, strict=False)
            ],
            self.files,
        )


def read_text(pattern: str, fields: Sequence[str]) -> TextFiles:
    """The files that a path, a folder or a glob names, sorted by path."""
    texts, files = [], find_files(pattern, TEXT_SUFFIXES)
    for path in files:
        content = _read(path)
        try:
            texts.append(content.decode())
        except UnicodeDecodeError as error:
            raise not_utf8(path, error.start, content[error.start]) from None
    return TextFiles(texts, files)


def find_files(pattern: str, suffixes: Sequence[str]) -> list[Path]:
    """The file, the files of a glob, or all with one of the suffixes in a folder, sorted by path.

    Raises:
      DataError: there are none.
    """
    path = user_path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.name.endswith(tuple(suffixes))]
        looked_for = f"file ending in {', '.join(suffixes)} in the folder {pattern!r}"
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        looked_for = f"file {pattern!r}"
    files = sorted(file for file in found if file.is_file())
    if not files:
        hint = " (a slice has a colon: [:90%])" if pattern.endswith("]") else ""
        raise DataError(f"there is no {looked_for}, seen from {os.getcwd()}{hint}.")
    return files


def _read(path: Path) -> bytes:
    """The content of a file, unpacked if compressed."""
    try:
        with open_file(path) as file:
            if path.suffix not in COMPRESSIONS:
                return file.read()
            chunks, size, packed = [], 0, path.stat().st_size
            while chunk := file.read(1 << 20):
                chunks.append(chunk)
                size += len(chunk)
                check_unpacked(path, size, packed)
            return b"".join(chunks)
    except UNPACKING_ERRORS as error:
        raise unreadable(path, error) from error


def open_file(path: Path) -> BinaryIO:
    """Opens a file to read, unpacked if compressed; reading raises one of ``UNPACKING_ERRORS`` where it is damaged.

    Raises:
      DataError: there is no such file.
    """
    try:
        if path.suffix in COMPRESSIONS:
            return COMPRESSIONS[path.suffix](path, "rb")
        return path.open("rb", BUFFER)
    except FileNotFoundError:
        raise DataError(f"there is no file {str(path)!r}, seen from {os.getcwd()}.") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null in it
        raise unreadable(path, error) from error


def check_unpacked(path: Path, size: int, packed: int) -> None:
    """Raises a DataError where a file of ``packed`` bytes has unpacked to more than text ever does."""
    if size > max(MOST_UNPACKED, MOST_RATIO * packed):
        raise DataError(
            f"{path} cannot be read: its {packed:,} bytes unpack to more than {size:,}, which no text does. Unpack it "
            "yourself if that is meant."
        )


def unreadable(path: Path, error: Exception) -> DataError:
    """The error for a file that is there and cannot be read or unpacked."""
    return DataError(f"{path} cannot be read: {error or type(error).__name__}")


def not_utf8(path: Path, offset: int, byte: int) -> DataError:
    """The error for a byte that is no part of a character."""
    return DataError(f"{path} is not UTF-8 text: byte 0x{byte:02x} at offset {offset:,}. Convert the file to UTF-8.")


# jsonl:


class _JsonLines(Sequence):
    """Records of a JSON Lines file, parsed when asked for; blank lines are passed over."""

    def __init__(self, path: Path, fields: Sequence[str]):
        self.files = (path,)
        self._content = _read(path)
        breaks = np.flatnonzero(np.frombuffer(self._content, np.uint8) == ord("\n"))
        starts, stops = [0, *(breaks + 1).tolist()], [*breaks.tolist(), len(self._content)]
        self._spans = []
        for number, (start, stop) in enumerate(zip(starts, stops, strict=True), start=1):
            if self._content[start:stop].strip():
                parse_record(self._content[start:stop], path, number, start, fields)
                self._spans.append((start, stop))
        self._spans = np.array(self._spans, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Record:
        start, stop = self._spans[index].tolist()
        return json.loads(self._content[start:stop])


def parse_record(content: bytes, path: Path, number: int, start: int, fields: Sequence[str]) -> Record:
    """The record on a line of a JSON Lines file; a DataError where it is none, or lacks one of the fields.

    Args:
      content: the line.
      path, number, start: the file, the line's number in it from 1, and the byte that it begins at.
      fields: what the record must hold.
    """
    where = f"{path} line {number}"
    try:
        line = content.decode("utf-8" if start else "utf-8-sig")  # files that begin with a mark of their byte order
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise not_utf8(path, start + error.start, content[error.start]) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets in brackets in …
        raise DataError(f"{where} is not JSON that can be read: {error}.") from None
    check_fields(where, record, fields)
    if "\\u" in line:  # half a character, which JSON lets through and UTF-8 does not
        for name in fields:
            value = lookup(where, record, name)
            if isinstance(value, str) and _SURROGATE.search(value):
                raise DataError(f"field {name!r} of {where} holds half of a surrogate pair; it is not Unicode text.")
    return record


def read_jsonl(name: str, fields: Sequence[str]) -> Sequence[Record]:
    """A JSON Lines file, every line of it checked."""
    return _JsonLines(user_path(name), fields)


# tfds:


class _TfdsRecords(Sequence):
    """Records of a TFDS data source, bytes made text and scalars made Python's own.

    Attributes:
      files: that they are read from.
      class_names: of each field that holds classes, their names in order.
    """

    def __init__(self, data_source: Sequence, features: Mapping[str, Any], files: Sequence[Path]):
        self._data_source, self.files = data_source, tuple(files)
        self.class_names = {name: tuple(f.names) for name, f in features.items() if getattr(f, "names", None)}

    def __len__(self) -> int:
        return len(self._data_source)

    def __getitem__(self, index: int) -> Record:
        return {name: plain(value) for name, value in self._data_source[index].items()}


def import_tfds(purpose: str) -> Any:
    """The module tensorflow_datasets, with its data sets of text; an LmxError where it is not installed."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise missing_extra("tensorflow-datasets", "tfds", purpose) from None
    # It registers its data sets kind by kind, and stops without a word at the first kind that needs TensorFlow.
    for kind in ("text", "translate", "summarization"):
        importlib.import_module(f"tensorflow_datasets.{kind}")
    return tfds


def read_tfds(name: str, fields: Sequence[str]) -> Sequence[Record]:
    """A split of a TFDS dataset, which is downloaded and prepared first where it is not on disk yet.

    The dataset is a name that TFDS knows, one that lies prepared in TFDS_DATA_DIR, or the folder of a prepared one.
    """
    name, _, split = name.partition("@")
    split = split or "train"
    tfds = import_tfds(f"the source tfds:{name}")
    folder = {"data_dir": os.environ["TFDS_DATA_DIR"]} if "TFDS_DATA_DIR" in os.environ else {}
    try:
        if (user_path(name) / "dataset_info.json").is_file():
            builder = tfds.builder_from_directory(user_path(name), file_format="array_record")
        else:
            builder = tfds.builder(name, file_format="array_record", **folder)
        if not builder.is_prepared():
            print(f"lmx: downloading and preparing {name} into {builder.data_path}", file=sys.stderr)
            builder.download_and_prepare()
    except Exception as error:  # of many kinds: unknown names, no network, no space, a checksum
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"TFDS cannot provide {name!r}: {reason.rstrip('.')}. Without a network name files of your own, as in "
            "--config.data.train=text:PATH, or a folder that TFDS has prepared, in TFDS_DATA_DIR."
        ) from error
    if split not in builder.info.splits:
        raise DataError(f"the TFDS dataset {name!r} has no split {split!r}{nearest(split, builder.info.splits)}")
    try:
        data_source = builder.as_data_source(split=split)
    except NotImplementedError as error:  # prepared once in a format without random access
        raise DataError(
            f"{builder.data_path} holds {name!r} in a format without random access. Prepare it again with "
            "tfds.builder(NAME, file_format='array_record').download_and_prepare()."
        ) from error
    files = [Path(path) for path in builder.info.splits[split].filepaths]
    return _TfdsRecords(data_source, builder.info.features, files)
