"""Next-token prediction (GPT: Radford et al. 2018, equation 1; Brown et al. 2020, section 2)."""

from typing import Any

import numpy as np

from lmx.config import Config
from lmx.objectives.base import Batch, Example, Sample, Term, TokenObjective, special_id
from lmx.text.packing import Cut
from lmx.text.tokenizers import Tokenizer


class Causal(TokenObjective):
    """Each position predicts the next token; the last one of a document predicts end-of-sequence.

    Every document starts with bos (eos where the tokenizer has no bos, as GPT-2's) and eos is a target only, so
    no position is spent on it: each token of the corpus, and one eos a document, is a target exactly once.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer):
        self.eos = special_id(tokenizer, ("eos",), "next-token prediction")
        start = special_id(tokenizer, ("bos", "eos"), "next-token prediction")
        self.length = config.data.length
        # Rows hold one token more than the model reads: the target of the last position, seen again as an input
        # at the start of the next row.
        self.cut = Cut(length=self.length + 1, overlap=1, before=(start,), packing=config.data.packing)
        self.sparse = not config.data.packing
        names = ("tokens", "targets", "weights", "segments", "positions")
        self.lengths = dict.fromkeys(names, self.length)
        self.label_smoothing, self.z_loss = config.objective.label_smoothing, config.objective.z_loss

    def view(self, row: dict[str, np.ndarray], rng: np.random.Generator, sample: Sample) -> Example:
        tokens, segments = row["tokens"], row["segments"]
        targets = np.where(segments[1:] == segments[:-1], tokens[1:], self.eos)
        if len(tokens) <= self.length:  # without a lookahead: the stream of documents ends here
            targets = np.append(targets, self.eos)
        length = len(targets)
        return {
            "tokens": tokens[:length],
            "targets": targets.astype(np.int32),
            "weights": np.ones(length, np.float32),
            "segments": segments[:length],
            "positions": row["positions"][:length],
        }

    def terms(self, model: Any, batch: Batch, train: bool = False) -> dict[str, Term]:
        head = model.lm_head(model.hidden(batch, train=train))
        return self.token_terms(head, batch["targets"], batch["weights"], train, batch.get("sources"))[0]
