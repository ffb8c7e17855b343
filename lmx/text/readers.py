"""Readers: all the records of one corpus, checked; :mod:`lmx.text.corpora` slices and mixes them."""

import glob
import gzip
import hashlib
import itertools
import json
import lzma
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmx.errors import DataError, missing_extra, nearest

Record = Mapping[str, Any]

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
COMPRESSIONS = {".gz": gzip.decompress, ".xz": lzma.decompress}
SYNTHETIC_RECORDS = 100_000


def check_fields(where: str, record: Any, fields: Sequence[str]) -> None:
    """Raises a DataError where a record is not an object that holds a text or a number in each of the fields."""
    if not isinstance(record, Mapping):
        raise DataError(f"{where} is not an object with fields but {type(record).__name__}; each record is one object.")
    for name in fields:
        if name not in record:
            raise DataError(
                f"{where} has no field {name!r}{nearest(name, record)}. The data section names the fields to read: "
                "text_field, pair_field, source_field, target_field, label_field."
            )
        if not isinstance(record[name], str | int | float):
            raise DataError(f"field {name!r} of {where} is {record[name]!r}, where a text or a number is due.")


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
    texts, files = [], _find_files(pattern)
    for path in files:
        content = _read(path)
        try:
            texts.append(content.decode())
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error.start, content[error.start]) from None
    return TextFiles(texts, files)


def _find_files(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        suffixes = tuple(text + packed for text in TEXT_SUFFIXES for packed in ("", *COMPRESSIONS))
        found = [file for file in path.rglob("*") if file.name.endswith(suffixes)]
        looked_for = f"files ending in {', '.join(suffixes)} in the folder {pattern!r}"
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
        content = path.read_bytes()
        return COMPRESSIONS[path.suffix](content) if path.suffix in COMPRESSIONS else content
    except FileNotFoundError:
        raise DataError(f"there is no file {str(path)!r}, seen from {os.getcwd()}.") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _not_utf8(path: Path, offset: int, byte: int) -> DataError:
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
                self._check(path, number, start, stop, fields)
                self._spans.append((start, stop))
        self._spans = np.array(self._spans, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Record:
        start, stop = self._spans[index].tolist()
        return json.loads(self._content[start:stop])

    def _check(self, path: Path, number: int, start: int, stop: int, fields: Sequence[str]) -> None:
        where = f"{path} line {number}"
        try:
            line = self._content[start:stop].decode()
            record = json.loads(line)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, start + error.start, self._content[start + error.start]) from None
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}.") from None
        check_fields(where, record, fields)
        if "\\u" in line:  # half a character, which JSON lets through and UTF-8 does not
            for name in fields:
                if isinstance(record[name], str) and any("\ud800" <= c <= "\udfff" for c in record[name]):
                    raise DataError(
                        f"field {name!r} of {where} holds half of a surrogate pair; it is not Unicode text."
                    )


def read_jsonl(name: str, fields: Sequence[str]) -> Sequence[Record]:
    """A JSON Lines file, every line of it checked."""
    return _JsonLines(Path(name).expanduser(), fields)


# tfds:


class _TfdsRecords(Sequence):
    """Records of a TFDS data source, bytes made text and scalars made Python's own."""

    def __init__(self, data_source: Sequence, files: Sequence[Path]):
        self._data_source, self.files = data_source, tuple(files)

    def __len__(self) -> int:
        return len(self._data_source)

    def __getitem__(self, index: int) -> Record:
        return {name: _plain(value) for name, value in self._data_source[index].items()}


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) or getattr(value, "shape", None) == () else value
    return value.decode() if isinstance(value, bytes) else value


def read_tfds(name: str, fields: Sequence[str]) -> Sequence[Record]:
    """A split of a TFDS dataset, which is downloaded and prepared first where it is not on disk yet."""
    name, _, split = name.partition("@")
    split = split or "train"
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise missing_extra("tensorflow-datasets", "tfds", f"the source tfds:{name}") from None
    folder = {"data_dir": os.environ["TFDS_DATA_DIR"]} if "TFDS_DATA_DIR" in os.environ else {}
    try:
        builder = tfds.builder(name, file_format="array_record", **folder)
        if not builder.is_prepared():
            print(f"lmx: downloading and preparing {name} into {builder.data_path}", file=sys.stderr)
            builder.download_and_prepare()
    except Exception as error:  # of many kinds: unknown names, no network, no space, a checksum
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"TFDS cannot provide {name!r}: {reason}") from error
    if split not in builder.info.splits:
        raise DataError(f"the TFDS dataset {name!r} has no split {split!r}{nearest(split, builder.info.splits)}")
    try:
        data_source = builder.as_data_source(split=split)
    except NotImplementedError as error:  # prepared once in a format without random access
        raise DataError(
            f"{builder.data_path} holds {name!r} in a format without random access. Prepare it again with "
            "tfds.builder(NAME, file_format='array_record').download_and_prepare()."
        ) from error
    return _TfdsRecords(data_source, [Path(path) for path in builder.info.splits[split].filepaths])
