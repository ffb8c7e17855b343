"""Objectives that show what the pipeline gave them, in place of real ones."""

import dataclasses

import numpy as np

from lmx.text.packing import Cut
from lmx.text.tokenizers import ByteTokenizer


@dataclasses.dataclass
class Rows:
    """A row as it is, a random number drawn for it, and a token sampled from the corpus."""

    cut: Cut = Cut(length=8)
    packable: bool = False
    dynamic: bool = True

    @property
    def lengths(self) -> dict[str, int]:
        return dict.fromkeys(("tokens", "segments", "positions", "weights"), self.cut.length)

    def view(self, row, rng, sample):
        weights = np.ones(len(row["tokens"]), np.float32)
        return {**row, "weights": weights, "draw": rng.random(), "sample": int(sample(rng, 1)[0])}


@dataclasses.dataclass
class Pairs:
    """A source and a target text, for a packing encoder-decoder."""

    length: int = 16
    packable: bool = True
    dynamic: bool = False
    cut: None = None

    @property
    def lengths(self) -> dict[str, int]:
        names = ("tokens", "segments", "positions")
        return {f"{prefix}_{name}": self.length for prefix in ("encoder", "decoder") for name in (*names, "weights")}

    def view(self, record, rng, sample):
        assert sample is None
        example = {}
        for prefix, field in (("encoder", "source"), ("decoder", "target")):
            tokens = np.array(ByteTokenizer().encode(record[field]), np.int32)
            example[f"{prefix}_tokens"] = tokens
            example[f"{prefix}_segments"] = np.ones_like(tokens)
            example[f"{prefix}_positions"] = np.arange(len(tokens), dtype=np.int32)
        return example | {"decoder_weights": np.ones(len(record["target"]), np.float32)}


@dataclasses.dataclass
class Labels:
    """A text and its number."""

    cut: None = None
    packable: bool = False
    dynamic: bool = False
    lengths: dict[str, int] = dataclasses.field(default_factory=lambda: {"tokens": 4})

    def view(self, record, rng, sample):
        tokens = np.array(ByteTokenizer().encode(record["text"]), np.int64)
        return {"tokens": tokens, "labels": record["label"], "label_weights": np.float64(1)}
