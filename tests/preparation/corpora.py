"""A small corpus with duplicates, and what is prepared of it."""

import json
from pathlib import Path

import numpy as np
from rich.console import Console

from lmx import config as schema
from lmx.preparation.prepare import prepare
from lmx.preparation.shards import Settings

DOCUMENTS = 120


def write_corpus(folder: Path) -> tuple[str, str]:
    """Writes text files and records; returns their source strings."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"word{i}" for i in rng.integers(0, 500, rng.integers(2, 60))) for _ in range(DOCUMENTS)]
    texts = [text.replace(" ", "\r\n", 1) for text in texts]
    texts += texts[:10]
    texts += [text + " and one more" for text in texts[10:40]]
    (folder / "texts").mkdir()
    for number, text in enumerate(texts[:40]):
        (folder / "texts" / f"{number:03d}.txt").write_text(text)
    (folder / "records.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[40:]))
    return f"text:{folder}/texts", f"jsonl:{folder}/records.jsonl"


def settings(sources: tuple[str, ...], **changes) -> Settings:
    return Settings(sources, **{"validation": 0.2, "part_bytes": 6000, **changes})


def run(
    output: Path, sources: tuple[str, ...], tokenizer: schema.Tokenizer | None = None, processes: int = 1, **changes
):
    """Prepares the sources, quietly; returns the manifest."""
    prepare(settings(sources, **changes), tokenizer or schema.Tokenizer(), output, Console(quiet=True), processes)
    return json.loads((output / "manifest.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
