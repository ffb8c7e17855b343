"""What is done to one part of a corpus: cleaning it, and writing its shards. The same wherever it runs.

Both leave files in the folder of the preparation, each written beside its place and renamed, the one that says that the
part is done last. So whoever finds that file need not do the part again, and two that do it at once do no harm.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmx.errors import DataError, missing_extra
from lmx.preparation.cleaning import UNREADABLE, Cleaner
from lmx.preparation.documents import Part, Reading, read_part
from lmx.preparation.duplicates import EXACT, MINIMA, NEAR, Bands, Column, minima, text_digest
from lmx.text.prepared import TRAIN, VALIDATION, token_type
from lmx.text.tokenizers import DESCRIPTION, Tokenizer, load_tokenizer

WORK, TOKENIZER = "work", "tokenizer"
CHARACTERS_AT_ONCE = 1 << 20
SHARD_OPTIONS = "group_size:1,zstd:1"  # read in any order; higher levels of zstd make files little smaller


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides every byte that is written, beside the sources and the tokenizer.

    Attributes:
      sources: source strings, in order.
      reading: how texts are taken from them.
      steps, min_words: see :mod:`lmx.preparation.cleaning`.
      duplicates: ``keep`` all, drop ``exact`` ones, or ``near`` ones too.
      similarity: from which estimated Jaccard similarity on documents are near-duplicates.
      validation: share of the documents that are held out, by their hash: the same document always is, or never.
      part_bytes: of the sources, that become a shard.
    """

    sources: tuple[str, ...]
    reading: Reading = Reading()
    steps: tuple[str, ...] = ("unicode", "control")
    min_words: int = 5
    duplicates: str = "near"
    similarity: float = 0.8
    validation: float = 0.01
    part_bytes: int = 16 * 10**6

    @property
    def bands(self) -> Bands:
        """How near-duplicates are looked for."""
        return Bands.of(self.similarity)


@dataclasses.dataclass(frozen=True)
class Job:
    """A preparation: its settings, the parts that they cut the sources into, and its folder."""

    settings: Settings
    parts: tuple[Part, ...]
    folder: Path

    def file(self, number: int, kind: str) -> Path:
        """Where a part keeps something while the preparation is at work."""
        return self.folder / WORK / f"{number:05d}.{kind}"

    def shard(self, number: int, split: str) -> Path:
        """The shard of a part."""
        return self.folder / f"{split}-{number:05d}.array_record"

    def done(self, number: int, kind: str) -> dict[str, Any] | None:
        """What a part's ``cleaned`` or ``written`` file tells; none where it is yet to be done."""
        path = self.file(number, kind)
        return json.loads(path.read_text()) if path.is_file() else None

    def digests(self) -> Column:
        """Each document's hash in two halves."""
        return Column([self.file(number, "digests") for number in range(len(self.parts))], np.uint64, 2)

    def signatures(self) -> Column | None:
        """Each document's minima, where near-duplicates are looked for."""
        if self.settings.duplicates != "near":
            return None
        return Column([self.file(number, "minima") for number in range(len(self.parts))], np.uint32, MINIMA)


class Beside:
    """Files written beside their places, and renamed together at the end if nothing was raised."""

    def __init__(self, *paths: Path):
        # Whoever writes the same file at once has another process id.
        self._places = {path.with_name(f"{path.name}.{os.getpid()}.tmp"): path for path in paths}

    def __enter__(self) -> list[Path]:
        return list(self._places)

    def __exit__(self, kind, *exception) -> None:
        for beside, path in self._places.items():
            if kind is None:
                beside.replace(path)
            else:
                beside.unlink(missing_ok=True)


def clean_part(job: Job, number: int) -> dict[str, Any]:
    """Reads and cleans a part, and hashes its documents; returns what was counted."""
    if (found := job.done(number, "cleaned")) is not None:
        return found
    settings, part = job.settings, job.parts[number]
    cleaner = Cleaner(settings.steps, settings.min_words)
    read = {"documents": 0, "characters": 0}
    digest, unreadable = hashlib.sha256(), {"documents": 0}

    def cleaned() -> Iterator[tuple[str, bytes]]:
        for text in read_part(part, settings.reading):
            read["documents"] += 1
            if isinstance(text, DataError):
                unreadable["documents"] += 1
                unreadable.setdefault("first", str(text))
                continue
            read["characters"] += len(text)
            digest.update(own := text_digest(text))
            if kept := cleaner(text):
                yield kept, own if kept is text else text_digest(kept)

    names = ["text", "lengths", "digests", *(["minima"] if settings.duplicates == "near" else [])]
    with Beside(*(job.file(number, name) for name in names)) as paths:
        files = [path.open("wb") for path in paths]
        try:
            for group in _groups(cleaned(), key=lambda item: item[0]):
                texts, digests = zip(*group, strict=True)
                encoded = [text.encode() for text in texts]
                columns = [
                    b"".join(encoded),
                    np.array([len(one) for one in encoded], np.uint64).tobytes(),
                    b"".join(digests),
                    *([minima(texts).tobytes()] if settings.duplicates == "near" else []),
                ]
                for file, column in zip(files, columns, strict=True):
                    file.write(column)
        finally:
            for file in files:
                file.close()
    counts = {"read": read, "sha256": digest.hexdigest(), "dropped": cleaner.dropped, "removed": cleaner.removed}
    counts[UNREADABLE] = unreadable
    write_json(job.file(number, "cleaned"), counts)
    return counts


def write_part(job: Job, number: int, reasons: Sequence[int]) -> dict[str, Any]:
    """Tokenizes what is left of a part and writes its shards; returns what was counted.

    Args:
      reasons: why each of its documents is dropped; 0 keeps it.
    """
    if (found := job.done(number, "written")) is not None:
        return found
    tokenizer = _opened_once(job.folder / TOKENIZER, (job.folder / TOKENIZER / DESCRIPTION).stat().st_mtime_ns)
    counts: dict[str, Any] = {"exact": 0, "near": 0}
    for name, reason in (("exact", EXACT), ("near", NEAR)):
        counts[name] = int(np.count_nonzero(np.asarray(reasons) == reason))
    splits = [_Shard(job, number, split, tokenizer) for split in (TRAIN, VALIDATION)]
    try:
        for group in _groups(kept_texts(job, number, reasons), key=lambda item: item[1]):
            for held_out, shard in enumerate(splits):
                shard.write([text for is_held_out, text in group if is_held_out == held_out])
    except BaseException:
        for shard in splits:
            shard.abandon()
        raise
    counts["shards"] = {shard.split: shard.finish() for shard in splits}
    write_json(job.file(number, "written"), counts)
    return counts


@functools.lru_cache(maxsize=1)
def _opened_once(folder: Path, written: int) -> Tokenizer:
    """The tokenizer of a folder, for all the parts that a process does; ``written`` tells one from the next there."""
    return load_tokenizer(folder)


def kept_texts(job: Job, number: int, reasons: Sequence[int]) -> Iterator[tuple[bool, str]]:
    """The cleaned documents of a part that are not dropped, and whether each is held out."""
    lengths = np.fromfile(job.file(number, "lengths"), np.uint64).tolist()
    digests = np.fromfile(job.file(number, "digests"), np.uint64).reshape(-1, 2)[:, 0]
    held_out = (digests < np.uint64(min(job.settings.validation * 2.0**64, 2**64 - 1))).tolist()
    with job.file(number, "text").open("rb") as file:
        for length, reason, out in zip(lengths, reasons, held_out, strict=True):
            text = file.read(length)
            if not reason:
                yield out, text.decode()


class _Shard:
    """A shard on its way: ArrayRecord, a document a record, and beside it how many tokens each has."""

    def __init__(self, job: Job, number: int, split: str, tokenizer: Tokenizer):
        self.split, self._tokenizer = split, tokenizer
        self._path, self._lengths_path = job.shard(number, split), job.file(number, f"{split}.tokens")
        self._beside = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        self._lengths: list[np.ndarray] = []
        self._type = token_type(tokenizer.vocab_size)
        self._characters = 0
        self._writer = None

    def write(self, texts: Sequence[str]) -> None:
        """Appends the documents that have tokens."""
        documents = [ids for ids in self._tokenizer.encode_batch(texts) if len(ids)] if texts else []
        if documents and self._writer is None:
            self._writer = _array_records().ArrayRecordWriter(str(self._beside), SHARD_OPTIONS)
        for ids in documents:
            self._writer.write(ids.astype(self._type).tobytes())
        self._characters += sum(map(len, texts))
        self._lengths.append(np.array([len(ids) for ids in documents], np.uint32))

    def abandon(self) -> None:
        """Removes what was written."""
        if self._writer is not None:
            self._writer.close()
            self._beside.unlink(missing_ok=True)

    def finish(self) -> dict[str, Any]:
        """Renames the shard; returns its name, hash and counts. There is no file where there are no documents."""
        lengths = np.concatenate(self._lengths or [np.zeros(0, np.uint32)])
        counts = {"documents": len(lengths), "characters": self._characters, "tokens": int(lengths.sum(dtype=np.int64))}
        with Beside(self._lengths_path) as (path,):
            lengths.tofile(path)
        if self._writer is None:
            return counts
        self._writer.close()
        with self._beside.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._beside.replace(self._path)
        return {"file": self._path.name, "bytes": self._path.stat().st_size, "sha256": digest} | counts


def write_json(path: Path, contents: Any) -> None:
    """Writes JSON beside its place, then renames it."""
    with Beside(path) as (beside,):
        beside.write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _groups(items: Iterable[Any], key: Callable[[Any], str]) -> Iterator[list[Any]]:
    """Lists of about a million characters, which libraries take faster than one text by one."""
    group, size = [], 0
    for item in items:
        group.append(item)
        size += len(key(item))
        if size >= CHARACTERS_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _array_records() -> Any:
    try:
        from array_record.python import array_record_module
    except ImportError:
        raise missing_extra("array_record", "tfds", "a shard") from None
    return array_record_module


def check_settings(settings: Settings) -> None:
    """Raises a DataError for a number out of range."""
    bounds = {"similarity": (0.05, 1), "validation": (0, 1), "min_words": (0, math.inf), "part_bytes": (1, math.inf)}
    for name, (low, high) in bounds.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            told = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise DataError(f"{name.replace('_', ' ')} must be {told}, not {value}.")
