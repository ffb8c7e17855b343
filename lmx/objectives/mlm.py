"""Masked language modelling and next-sentence prediction (BERT: Devlin et al. 2019, section 3.1)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from lmx.config import Config
from lmx.errors import ConfigError
from lmx.kernels.cross_entropy import cross_entropy
from lmx.objectives.base import (
    Batch,
    Example,
    Sample,
    Term,
    TokenObjective,
    one_segment,
    optional_id,
    special_id,
)
from lmx.text.packing import Cut
from lmx.text.tokenizers import Tokenizer


class MaskedLanguageModel(TokenObjective):
    """Predict the original of some tokens from both sides.

    Of the n ordinary tokens of a row, ``round(mask_rate * n)`` and at least one are chosen without replacement;
    each is replaced by the mask token, by a random ordinary token, or kept (``mask_split``). No row holds more
    chosen tokens than :attr:`num_predictions`, so only that many positions of a row pay for logits.

    With ``next_sentence`` a row is ``[CLS] A [SEP] B [SEP]``: A is the start of a piece of a document and B its
    rest (label 0) or, half the time, as many tokens from a random place of the corpus (label 1; fewer where the
    document drawn from ends).
    """

    def __init__(self, config: Config, tokenizer: Tokenizer):
        objective, length = config.objective, config.data.length
        self.tokenizer = tokenizer
        self.mask_id = special_id(tokenizer, ("mask",), "objective 'mlm'")
        self.is_ordinary = np.ones(tokenizer.vocab_size, bool)
        self.is_ordinary[sorted(tokenizer.special_ids)] = False
        self.ordinary_ids = np.flatnonzero(self.is_ordinary).astype(np.int32)
        self.cls, self.sep = optional_id(tokenizer.cls_id), optional_id(tokenizer.sep_id)
        self.mask_rate, self.mask_split = objective.mask_rate, objective.mask_split
        self.whole_word, self.next_sentence = objective.whole_word, objective.next_sentence
        self.dynamic = objective.dynamic_masks
        self.label_smoothing, self.z_loss = objective.label_smoothing, objective.z_loss
        self.num_predictions = num_chosen(length, self.mask_rate)

        names = ["tokens", "targets", "weights", "segments", "positions"]
        if self.next_sentence:
            special_id(tokenizer, ("sep",), "objective.next_sentence")
            room = length - len(self.cls) - 2 * len(self.sep)
            if room < 2:
                raise ConfigError(f"objective.next_sentence needs data.length of at least {length - room + 2}.")
            self.cut = Cut(length=room, split=False, packing=False)
            self.optimized = ("loss", "next_sentence")
            names.append("token_types")
        else:
            self.cut = Cut(length=length, split=False, before=self.cls, after=self.sep, packing=config.data.packing)
        self.sparse = not self.cut.packing
        self.lengths = dict.fromkeys(names, length)

    def view(self, row: dict[str, np.ndarray], rng: np.random.Generator, sample: Sample) -> Example:
        if self.next_sentence:
            example = self._pair(row["tokens"], rng, sample)
        else:
            example = {name: row[name] for name in ("tokens", "segments", "positions")}
        original = example["tokens"]
        chosen = self._choose(original, example["segments"], rng)
        weights = np.zeros(len(original), np.float32)
        weights[chosen] = 1
        return example | {"tokens": self._corrupt(original, chosen, rng), "targets": original, "weights": weights}

    def _pair(self, tokens: np.ndarray, rng: np.random.Generator, sample: Sample) -> Example:
        split = int(rng.integers(1, max(len(tokens), 2)))
        first, second = tokens[:split], tokens[split:]
        is_random = rng.random() < 0.5 or len(second) == 0
        if is_random:  # of the same length, so that length tells nothing
            second = np.asarray(sample(rng, max(len(second), 1)), np.int32)
        left = np.concatenate([self.cls, first, self.sep])
        right = np.concatenate([second, self.sep])
        return one_segment(np.concatenate([left, right])) | {
            "token_types": np.repeat(np.array([0, 1], np.int32), [len(left), len(right)]),
            "labels": np.int32(is_random),
            "label_weights": np.float32(1),
        }

    def _choose(self, tokens: np.ndarray, segments: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The positions to predict, in no order."""
        ordinary = self.is_ordinary[tokens]
        candidates = np.flatnonzero(ordinary)
        if len(candidates) == 0:
            return candidates
        budget = num_chosen(len(candidates), self.mask_rate)
        if not self.whole_word:
            return candidates[np.argpartition(rng.random(len(candidates)), budget - 1)[:budget]]
        edge = np.diff(segments, prepend=0) != 0
        edge |= ~np.concatenate([[True], ordinary[:-1]])  # what follows a special token is a new word
        starts = (np.asarray(self.tokenizer.word_starts(tokens), bool) | edge)[candidates]
        starts[0] = True
        words = np.split(candidates, np.flatnonzero(starts)[1:])
        return take_words(words, budget, rng)

    def _corrupt(self, tokens: np.ndarray, chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        to_mask, to_random, _ = self.mask_split
        draw = rng.random(len(chosen))
        others = self.ordinary_ids[rng.integers(len(self.ordinary_ids), size=len(chosen))]
        kept_or_other = np.where(draw < to_mask + to_random, others, tokens[chosen])
        corrupted = tokens.copy()
        corrupted[chosen] = np.where(draw < to_mask, self.mask_id, kept_or_other)
        return corrupted

    def weights(self, batch: Batch) -> dict[str, Array]:
        weights = super().weights(batch)
        if self.next_sentence:
            weights["next_sentence"] = jnp.sum(batch["label_weights"])
        return weights

    def terms(self, model: Any, batch: Batch, train: bool = False) -> dict[str, Term]:
        hidden = model.hidden(batch, train=train)
        names = [name for name in ("targets", "sources") if name in batch]
        weights, states, targets, *sources = gather_predictions(
            batch["weights"], self.num_predictions, hidden, *(batch[name] for name in names)
        )
        terms, _ = self.token_terms(model.mlm_head(states), targets, weights, train, *sources)
        if self.next_sentence:
            logits = model.classify(hidden, batch, train=train)
            weights = batch["label_weights"]
            correct = jnp.argmax(logits, axis=-1) == batch["labels"]
            nll = cross_entropy(logits, batch["labels"])
            terms["next_sentence"] = (jnp.sum(nll * weights), jnp.sum(weights))
            terms["next_sentence_accuracy"] = (jnp.sum(correct * weights), jnp.sum(weights))
        return terms


def num_chosen(num_tokens: int, mask_rate: float) -> int:
    """Tokens to predict among ``num_tokens``: never fewer for more tokens, so the longest row gives the bound."""
    return max(1, round(mask_rate * num_tokens))


def take_words(words: list[np.ndarray], budget: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of whole words in random order, as many as fit the budget (BERT's whole-word masking).

    Where no word is short enough the budget goes to pieces of a random one, so that every row teaches something.
    """
    order = rng.permutation(len(words))
    taken, left = [], budget
    for index in order:
        if len(words[index]) <= left:
            taken.append(words[index])
            left -= len(words[index])
    return np.concatenate(taken) if taken else words[order[0]][:budget]


def gather_predictions(
    weights: Float[Array, "batch length"], count: int, *values: Shaped[Array, "batch length ..."]
) -> tuple[Shaped[Array, "batch count ..."], ...]:
    """The weights of the ``count`` positions of each row that weigh most, and other values of these positions."""
    weights, positions = jax.lax.top_k(weights, count)
    places = (positions.reshape(*positions.shape, *[1] * (value.ndim - 2)) for value in values)
    return weights, *(jnp.take_along_axis(value, place, axis=1) for value, place in zip(values, places, strict=True))
