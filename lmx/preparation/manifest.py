"""What is written when every part is done: an index a split, and the manifest."""

import dataclasses
import hashlib
import importlib.metadata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lmx.preparation.cleaning import UNREADABLE
from lmx.preparation.shards import Beside, Job
from lmx.text.prepared import FORMAT, TOKENIZER, TRAIN, VALIDATION
from lmx.text.tokenizers import load_tokenizer


def write_indexes(job: Job) -> dict[str, dict[str, Any]]:
    """Writes where each document of a split begins, as int64; returns name and hash of the file of each split."""
    indexes = {}
    for split in (TRAIN, VALIDATION):
        path, digest, last = job.folder / f"{split}.index", hashlib.sha256(), 0
        with Beside(path) as (beside,), beside.open("wb") as file:
            for number in range(-1, len(job.parts)):
                lengths = np.fromfile(job.file(number, f"{split}.tokens"), np.uint32) if number >= 0 else [0]
                ends = last + np.cumsum(lengths, dtype=np.int64)
                last = int(ends[-1]) if len(ends) else last
                content = ends.astype("<i8").tobytes()
                digest.update(content)
                file.write(content)
        indexes[split] = {"file": path.name, "sha256": digest.hexdigest()}
    return indexes


def make_manifest(
    job: Job, sources: Sequence[dict[str, Any]], section: dict[str, Any], indexes: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The manifest: nothing in it depends on when, where or by how many the work was done.

    Args:
      job: all its parts are done.
      sources: spec and files of each source.
      section: the tokenizer as it was asked for.
      indexes: of :func:`write_indexes`.
    """
    cleaned = [job.done(number, "cleaned") for number in range(len(job.parts))]
    written = [job.done(number, "written") for number in range(len(job.parts))]
    tokenizer = load_tokenizer(job.folder / TOKENIZER)
    dropped: dict[str, dict[str, Any]] = {UNREADABLE: _unreadable(cleaned)}
    for name in cleaned[0]["dropped"] if cleaned else ():
        dropped[name] = {kind: sum(part[key][name] for part in cleaned) for kind, key in _COUNTED.items()}
    for name in ("exact", "near"):
        dropped[name] = {"documents": sum(part[name] for part in written)}
    if section["path"] and section["kind"] == "sentencepiece":
        section = section | {"vocab_size": tokenizer.vocab_size}
    libraries = ("array_record", *(["rensa"] if job.settings.duplicates == "near" else []))
    return {
        "format": FORMAT,
        "settings": dataclasses.asdict(job.settings),
        "sources": [source | _content(job, number, cleaned) for number, source in enumerate(sources)],
        "tokenizer": {
            "sha256": tokenizer.fingerprint(),
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "section": section,
        },
        "counts": {"read": _total(part["read"] for part in cleaned), "dropped": dropped},
        "splits": {split: _split(split, written, index) for split, index in indexes.items()},
        "libraries": {name: importlib.metadata.version(name) for name in libraries},
    }


def _unreadable(cleaned: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many records were skipped, and what was wrong with the first."""
    first = [{"first": part[UNREADABLE]["first"]} for part in cleaned if part[UNREADABLE]["documents"]]
    return {"documents": sum(part[UNREADABLE]["documents"] for part in cleaned)} | (first[0] if first else {})


_COUNTED = {"documents": "dropped", "characters": "removed"}


def _content(job: Job, source: int, cleaned: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of a source, and a hash over the documents that were read of it."""
    parts = [counts for part, counts in zip(job.parts, cleaned, strict=True) if part.source == source]
    digest = hashlib.sha256("".join(part["sha256"] for part in parts).encode())
    return {"read": _total(part["read"] for part in parts), "sha256": digest.hexdigest()}


def _split(split: str, written: Sequence[dict[str, Any]], index: dict[str, Any]) -> dict[str, Any]:
    shards = [part["shards"][split] for part in written]
    counts = {name: sum(shard[name] for shard in shards) for name in ("documents", "characters", "tokens")}
    return counts | {"index": index, "shards": [shard for shard in shards if "file" in shard]}


def _total(counts) -> dict[str, int]:
    total = Counter(documents=0, characters=0)
    for one in counts:
        total.update(one)
    return dict(total)
