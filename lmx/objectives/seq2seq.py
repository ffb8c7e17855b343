"""Sequence to sequence: a target text from a source text (Sutskever et al. 2014; Vaswani et al. 2017)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lmx.config import Config
from lmx.errors import DataError
from lmx.objectives.base import (
    Batch,
    Example,
    Sample,
    Term,
    TokenObjective,
    exact_match,
    one_segment,
    special_id,
    text_of,
)
from lmx.text.tokenizers import Tokenizer


class EncoderDecoderObjective(TokenObjective):
    """Cross-entropy of a decoder's tokens given an encoder's, with teacher forcing.

    ``exact_match`` is the fraction of examples with every token right given the right ones before it, which is also
    the fraction that greedy decoding would write without an error.
    """

    weights_name = "decoder_weights"

    def __init__(self, config: Config, tokenizer: Tokenizer):
        purpose = f"objective {config.objective.name!r}"
        self.eos = special_id(tokenizer, ("eos", "sep"), purpose)
        self.start = special_id(tokenizer, ("pad", "bos", "eos"), purpose)
        self.sparse = not config.data.packing
        self.label_smoothing, self.z_loss = config.objective.label_smoothing, config.objective.z_loss

    def set_lengths(self, encoder: int, decoder: int) -> None:
        names = ("tokens", "segments", "positions")
        self.lengths = {f"encoder_{name}": encoder for name in names}
        self.lengths |= {f"decoder_{name}": decoder for name in (*names, "targets", "weights")}

    def terms(self, model: Any, batch: Batch, train: bool = False) -> dict[str, Term]:
        head = model.lm_head(model.hidden(batch, train=train))
        targets, weights = batch["decoder_targets"], batch["decoder_weights"]
        terms, right = self.token_terms(head, targets, weights, train, batch.get("decoder_sources"))
        return terms | {"exact_match": exact_match(right, weights, batch["decoder_segments"])}


class Seq2Seq(EncoderDecoderObjective):
    """Records with a source and a target text.

    The encoder reads ``source eos``; the decoder reads the pad token (T5's start; bos, then eos, where there is no
    pad) and the target, and predicts ``target eos``.

    Raises (from :meth:`view`):
      DataError: a field is missing or not text, or a text is too long and ``data.too_long`` is "error".
    """

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__(config, tokenizer)
        self.tokenizer = tokenizer
        self.data = config.data
        self.packable = config.data.packing
        self.set_lengths(config.data.length, config.data.target_length)

    def view(self, record: Mapping[str, Any], rng: np.random.Generator, sample: Sample | None) -> Example:
        source = self._fitted(record, "source_field", "length")
        target = self._fitted(record, "target_field", "target_length")
        return one_segment(source, "encoder_") | decoder_side(target, self.start)

    def rows(self, record: Mapping[str, Any]) -> int:
        sides = (("source_field", self.data.length), ("target_field", self.data.target_length))
        return max(-(-len(self._encode(record, option)) // longest) for option, longest in sides)

    def _encode(self, record: Mapping[str, Any], option: str) -> list[int]:
        return [*self.tokenizer.encode(text_of(record, getattr(self.data, option), option)), self.eos]

    def _fitted(self, record: Mapping[str, Any], option: str, limit: str) -> np.ndarray:
        """The tokens of a side, no more than fit; eos stands at the end of what is cut too."""
        tokens, longest = self._encode(record, option), getattr(self.data, limit)
        if len(tokens) > longest and self.data.too_long == "error":
            field = getattr(self.data, option)
            raise DataError(
                f"field {field!r} of the record that starts {record[field][:60]!r} has {len(tokens)} tokens with its "
                f"eos, more than data.{limit} ({longest}); raise data.{limit}, or set data.too_long to 'drop' or 'cut'."
            )
        return np.array([*tokens[: min(len(tokens), longest) - 1], self.eos], np.int32)


def decoder_side(targets: np.ndarray, start: int) -> Example:
    """Targets, each of weight 1, and as inputs the same shifted right behind ``start``."""
    return one_segment(np.concatenate([[start], targets[:-1]]), "decoder_") | {
        "decoder_targets": np.asarray(targets, np.int32),
        "decoder_weights": np.ones(len(targets), np.float32),
    }
