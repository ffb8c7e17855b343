"""Span corruption (T5: Raffel et al. 2020, sections 3.1.4 and 3.3.4)."""

import numpy as np
from jaxtyping import Bool

from lmx.config import Config
from lmx.errors import ConfigError
from lmx.objectives.base import Example, Sample, one_segment
from lmx.objectives.seq2seq import EncoderDecoderObjective, decoder_side
from lmx.text.packing import Cut
from lmx.text.tokenizers import Tokenizer


class SpanCorruption(EncoderDecoderObjective):
    """Random spans are replaced by one sentinel each; the decoder writes each sentinel and what it stands for.

    Raw ``a b c d e f`` with ``b c`` and ``f`` as noise gives inputs ``a <0> d e <1> eos`` and targets
    ``<0> b c <1> f eos``; the decoder reads the targets shifted right behind the pad token, as T5's does. The raw
    window is the longest whose inputs fit ``data.length``, and the decoder's length is worked out from it, so
    full rows fill the encoder exactly and nothing is ever cut off.

    As in T5, packed documents run on in the window and attend to each other; ``data.packing=False`` keeps each
    in windows of its own.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__(config, tokenizer)
        self.noise_density, self.mean_span_length = config.objective.mask_rate, config.objective.mean_span_length
        if not 0 < self.noise_density < 1:
            raise ConfigError(
                f"span corruption leaves some tokens and replaces others, so objective.mask_rate must be between 0 and "
                f"1, not {self.noise_density}; T5 has 0.15."
            )
        raw, target_length = window_lengths(config.data.length, self.noise_density, self.mean_span_length)
        _, num_spans = noise_counts(raw, self.noise_density, self.mean_span_length)
        if len(tokenizer.sentinel_ids) < num_spans:
            raise ConfigError(
                f"span corruption of rows of {raw} tokens needs {num_spans} sentinels, and the tokenizer has "
                f"{len(tokenizer.sentinel_ids)}; set tokenizer.num_sentinels to at least {num_spans}."
            )
        self.sentinels = np.array(tokenizer.sentinel_ids, np.int32)
        self.cut = Cut(length=raw, packing=config.data.packing)
        self.dynamic = config.objective.dynamic_masks
        self.set_lengths(config.data.length, target_length)

    def view(self, row: dict[str, np.ndarray], rng: np.random.Generator, sample: Sample) -> Example:
        tokens = row["tokens"]
        noise = noise_mask(len(tokens), self.noise_density, self.mean_span_length, rng)
        inputs = np.append(replace_spans(tokens, noise, self.sentinels), self.eos)
        targets = np.append(replace_spans(tokens, ~noise, self.sentinels), self.eos)
        return one_segment(inputs, "encoder_") | decoder_side(targets, self.start)


def noise_counts(num_tokens: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """Noise tokens and noise spans among ``num_tokens``; neither falls when ``num_tokens`` grows.

    Every span of noise follows at least one kept token, and a lone token is kept.
    """
    noise = min(max(round(num_tokens * noise_density), 1), num_tokens - 1)
    spans = min(max(round(noise / mean_span_length), 1), noise, num_tokens - noise)
    return noise, spans


def window_lengths(input_length: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """Raw tokens of the longest window whose inputs fit ``input_length``, and the length of its targets.

    T5's ``random_spans_helper``: 512 inputs at 15% in spans of 3 are 568 raw tokens and 114 targets.

    Raises:
      ConfigError: not even two raw tokens fit.
    """

    def lengths(raw: int) -> tuple[int, int]:
        noise, spans = noise_counts(raw, noise_density, mean_span_length)
        return raw - noise + spans + 1, noise + spans + 1

    raw = 1
    while lengths(raw + 1)[0] <= input_length:
        raw += 1
    if raw < 2:
        raise ConfigError(f"data.length ({input_length}) is too short for span corruption; it needs at least 3.")
    return raw, lengths(raw)[1]


def noise_mask(
    num_tokens: int, noise_density: float, mean_span_length: float, rng: np.random.Generator
) -> Bool[np.ndarray, " length"]:
    """True on noise: kept and noise spans alternate, a kept one first, each split into random lengths."""
    noise, spans = noise_counts(num_tokens, noise_density, mean_span_length)
    if spans == 0:
        return np.zeros(num_tokens, bool)
    lengths = np.stack([_split(num_tokens - noise, spans, rng), _split(noise, spans, rng)], axis=1)
    return np.repeat(np.tile([False, True], spans), lengths.ravel())


def replace_spans(tokens: np.ndarray, replaced: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """The tokens with each run of ``replaced`` ones turned into the next sentinel."""
    first = replaced & ~np.concatenate([[False], replaced[:-1]])
    filled = np.where(first, sentinels[np.cumsum(first) - 1], tokens)
    return filled[first | ~replaced]


def _split(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Random lengths, none 0, of ``parts`` that sum to ``total``; every such list is equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)
