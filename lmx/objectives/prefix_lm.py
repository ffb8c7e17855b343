"""Prefix language modelling (Liu et al. 2018, section 4.2.3; Raffel et al. 2020, section 3.2.1)."""

import numpy as np

from lmx.config import Config
from lmx.objectives.base import Example, Sample
from lmx.objectives.causal import Causal
from lmx.text.tokenizers import Tokenizer


class PrefixLM(Causal):
    """As :class:`Causal`, but a random part of each document is a prefix that sees itself in both directions.

    Of the n tokens of a segment the first 1 … n, uniformly, are its prefix. The last of them predicts the first
    token behind the prefix; the ones before it have seen their next token, so they weigh nothing.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__(config, tokenizer)
        self.lengths["prefix"] = self.length
        self.sparse = True  # nobody predicts the prefixes
        self.dynamic = config.objective.dynamic_masks

    def view(self, row: dict[str, np.ndarray], rng: np.random.Generator, sample: Sample) -> Example:
        example = super().view(row, rng, sample)
        _, starts, sizes = np.unique(example["segments"], return_index=True, return_counts=True)
        prefix_sizes = rng.integers(1, sizes, endpoint=True)
        offsets = np.arange(len(example["tokens"])) - np.repeat(starts, sizes)
        ahead = np.repeat(prefix_sizes, sizes) - offsets  # prefix tokens from here on, this one included
        example["prefix"] = (ahead > 0).astype(np.int32)
        example["weights"] = (ahead <= 1).astype(np.float32)
        return example
