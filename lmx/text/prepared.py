"""Corpora that ``lmx data prepare`` wrote: tokens by random access, and the tokenizer that made them.

A folder holds ``manifest.json``, ``tokenizer/``, and for each split (``train``, ``validation``) ArrayRecord shards, a
document's tokens a record, and an index: where each document begins, and where the last one ends.
"""

import functools
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from lmx.config import Tokenizer as TokenizerSection
from lmx.errors import ConfigError, DataError, missing_extra, nearest
from lmx.paths import user_path
from lmx.text.tokenizers import Tokenizer, load_tokenizer, make_tokenizer

MANIFEST, TOKENIZER, FORMAT = "manifest.json", "tokenizer", 1
# What a config says of a tokenizer that it does not name by path.
MADE_BY = {
    "bytes": ("num_sentinels", "lowercase"),
    "characters": ("num_sentinels", "lowercase"),
    "sentencepiece": ("vocab_size", "model_type", "byte_fallback", "num_sentinels", "lowercase"),
}
TRAIN, VALIDATION = "train", "validation"
DOCUMENTS_HELD = 64


def token_type(vocab_size: int) -> np.dtype:
    """The type that ids are stored in: two bytes each where the vocabulary allows it."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What ``lmx data prepare`` says about the folder that it wrote.

    Raises:
      DataError: the folder is not prepared, not to the end, or its manifest is damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        _check_manifest(manifest)
        return manifest
    except FileNotFoundError:
        hint = "is not finished: run the same `lmx data prepare` again" if (folder / "work").is_dir() else "has none"
        raise DataError(f"a prepared folder holds {MANIFEST}, and {str(folder)!r} {hint}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} is damaged ({error!r}); remove {str(folder)!r}, and prepare the corpus again."
        ) from None


def _check_manifest(manifest: Any) -> None:
    if manifest["format"] != FORMAT:
        raise ValueError(f"format {manifest['format']!r}, where {FORMAT} is known")
    names = [split["index"]["file"] for split in manifest["splits"].values()]
    for split in manifest["splits"].values():
        names += [shard["file"] for shard in split["shards"]]
        numbers = [shard[key] for shard in split["shards"] for key in ("documents", "bytes")]
        if any(type(number) is not int or number < 0 for number in [*numbers, split["documents"], split["tokens"]]):
            raise ValueError("a count that is none")
        if sum(shard["documents"] for shard in split["shards"]) != split["documents"]:
            raise ValueError("the documents of the shards do not add up")
    for name in names:
        if type(name) is not str or os.path.basename(name) != name or name in ("", ".", ".."):
            raise ValueError(f"the file {name!r} is none of this folder")
    manifest["tokenizer"]["sha256"], manifest["tokenizer"]["section"], manifest["tokenizer"]["vocab_size"]


def split_files(split: Mapping[str, Any]) -> dict[str, str | None]:
    """The files of a manifest's split, and the SHA-256 that it has of each."""
    return {file["file"]: file.get("sha256") for file in (split["index"], *split["shards"])}


class PreparedDocuments(Sequence[Mapping[str, Any]]):
    """The documents of a split, or a run of them. As records they hold the decoded ``text``.

    Attributes:
      offsets: where each document begins among the tokens of all, and where the last one ends.
      files: the manifest, and the index and the shards of the split.
    """

    def __init__(self, folder: Path, split: str, chosen: range | None = None):
        """Opens a split; a DataError where a file is missing or has another size than the manifest says."""
        self.folder, self.split = folder, split
        self._manifest = read_manifest(folder)
        splits = self._manifest["splits"]
        if split not in splits:
            raise DataError(f"{str(folder)!r} has no split {split!r}{nearest(split, splits)}")
        for shard in splits[split]["shards"]:
            _check_size(folder / shard["file"], shard["bytes"])
        self.files = tuple(folder / name for name in (MANIFEST, *split_files(splits[split])))
        total = splits[split]["documents"]
        offsets = _read_index(folder / splits[split]["index"]["file"], total, splits[split]["tokens"])
        self._chosen = range(total) if chosen is None else chosen
        run = offsets[self._chosen.start : self._chosen.stop + 1]
        self.offsets: Int64[np.ndarray, " boundaries"] = run - run[0] if self._chosen.start else run

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {"text": self.tokenizer.decode(self.records[self._chosen[index]])}

    def part(self, chosen: range) -> "PreparedDocuments":
        """Some of the documents."""
        return PreparedDocuments(self.folder, self.split, self._chosen[chosen.start : chosen.stop])

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The one that made the tokens."""
        return load_tokenizer(self.folder / TOKENIZER)

    @functools.cached_property
    def records(self) -> "_Shards":
        """The tokens of the documents of the whole split, by number."""
        shards = self._manifest["splits"][self.split]["shards"]
        return _Shards(self.folder, shards, token_type(self._manifest["tokenizer"]["vocab_size"]))

    def tokens(self, tokenizer: Tokenizer) -> "PreparedTokens":
        """All tokens end to end; a ConfigError where another tokenizer made them."""
        if tokenizer.fingerprint() != self._manifest["tokenizer"]["sha256"]:
            raise ConfigError(
                f"prepared:{self.folder} holds the tokens of another tokenizer than the one in use; set "
                f"tokenizer.path={self.folder / TOKENIZER} and tokenizer.kind={self.tokenizer.kind!r}, or prepare the "
                "corpus again with --tokenizer."
            )
        return PreparedTokens(self.records, self.offsets, self._chosen.start)


class PreparedTokens:
    """The tokens of documents end to end, of which ``[start:stop]`` reads what it needs."""

    def __init__(self, records: "_Shards", offsets: np.ndarray, first: int):
        self._records, self._offsets, self._first = records, offsets, first

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, place: slice) -> Int32[np.ndarray, " tokens"]:
        start, stop, _ = place.indices(len(self))
        document = int(np.searchsorted(self._offsets, start, side="right")) - 1
        parts = []
        while start < stop:
            begin, end = self._offsets[document : document + 2].tolist()
            parts.append(self._records[self._first + document][start - begin : min(stop, end) - begin])
            start, document = end, document + 1
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)


class _Shards:
    """Documents of all shards by number. Reads again what it is asked for again, but for the last few."""

    def __init__(self, folder: Path, shards: Sequence[Mapping[str, Any]], kind: np.dtype):
        self._paths = [str(folder / shard["file"]) for shard in shards]
        self._starts = list(itertools.accumulate((shard["documents"] for shard in shards), initial=0))
        self._kind = kind
        self._open()

    def _open(self) -> None:
        self._readers: dict[int, Any] = {}
        self._read = functools.lru_cache(DOCUMENTS_HELD)(self._read_document)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_readers", "_read")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __getitem__(self, document: int) -> Int32[np.ndarray, " tokens"]:
        return self._read(document)

    def _read_document(self, document: int) -> np.ndarray:
        shard = int(np.searchsorted(self._starts, document, side="right")) - 1
        if shard not in self._readers:
            self._readers[shard] = _reader(self._paths[shard], self._starts[shard + 1] - self._starts[shard])
        try:
            content = self._readers[shard].read([document - self._starts[shard]])[0]
            return np.frombuffer(content, self._kind).astype(np.int32)
        except (RuntimeError, IndexError, ValueError) as error:
            raise DataError(f"{self._paths[shard]} is damaged ({error}); prepare the corpus again.") from None


def _reader(path: str, documents: int) -> Any:
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError:
        raise missing_extra("array_record", "tfds", "a prepared corpus") from None
    try:
        reader = ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
        if reader.num_records() == documents:
            return reader
        reason = f"it has {reader.num_records():,} documents, not {documents:,}"
    except (RuntimeError, ValueError) as error:
        reason = str(error)
    raise DataError(f"{path} is damaged ({reason}); prepare the corpus again.")


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing: copy it there, or prepare the corpus again.")
    if path.stat().st_size != size:
        raise DataError(f"{path} has {path.stat().st_size:,} bytes, not {size:,}: it was cut short or changed.")


def _read_index(path: Path, documents: int, tokens: int) -> np.ndarray:
    _check_size(path, 8 * (documents + 1))
    offsets = np.memmap(path, "<i8", "r")
    if offsets[0] != 0 or offsets[-1] != tokens:
        raise DataError(f"{path} is damaged: it ends at {int(offsets[-1]):,}, not at {tokens:,}. Prepare again.")
    return offsets


def read_prepared(name: str, fields: Sequence[str]) -> PreparedDocuments:
    """A split (``train`` if none is named) of a folder that ``lmx data prepare`` wrote."""
    folder, _, split = name.rpartition("@") if "@" in name and "/" not in name.rpartition("@")[2] else (name, "", "")
    return PreparedDocuments(user_path(folder), split or TRAIN)


def prepared_tokenizer(documents: PreparedDocuments, section: TokenizerSection) -> Tokenizer:
    """The tokenizer that made the tokens, after checking that it is the one that a config asks for.

    Raises:
      ConfigError: the config asks for another.
    """
    made = read_manifest(documents.folder)["tokenizer"]
    if section.path:
        asked = make_tokenizer(section, lambda: ())
        different = [] if asked.fingerprint() == made["sha256"] else [f"tokenizer.path={section.path!r} is another"]
    else:
        names = ("kind", *MADE_BY.get(section.kind, ()))
        pairs = {name: (getattr(section, name), made["section"].get(name)) for name in names}
        different = [f"tokenizer.{name} is {a!r} here and {b!r} there" for name, (a, b) in pairs.items() if a != b]
    if different:
        raise ConfigError(
            f"prepared:{documents.folder} holds the tokens of another tokenizer than config.tokenizer asks for: "
            f"{'; '.join(different)}. Set tokenizer.path={documents.folder / TOKENIZER} and "
            f"tokenizer.kind={documents.tokenizer.kind!r}, or prepare the corpus again."
        )
    return documents.tokenizer
