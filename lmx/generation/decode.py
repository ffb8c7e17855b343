"""Decoding with a cache of keys and values.

Prompts of unequal length are padded on the *left*, so that in every row the last prompt token stands in the same
slot and all rows go on together. Lengths are rounded up to a few sizes: a prompt of a new length finds a compiled
program. The whole loop is on the device and ends when every row has stopped.

A Switch layer's capacity counts slots, padding included: a long prompt that overflows an expert can drop fewer
tokens here than in a forward pass over it alone.
"""

import functools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from lmx.errors import LmxError
from lmx.generation.sampling import Sampling, choose, make_sampling
from lmx.model_config import Model
from lmx.models.attention import Cache
from lmx.models.transformer import Transformer

BUCKET = 64  # lengths above it are rounded up to its multiples, those below to powers of two


@struct.dataclass
class Decoding:
    """Rows being decoded: all that the next token needs beside the parameters.

    Attributes:
      cache: slots filled, and which of them are padding or prefix.
      padding: slots before a row's first token; a token's position is its slot less this.
      variables: keys and values, the model's "cache" collection.
      encoded, encoder_segments: the encoder's output and its padding (encoder-decoder only).
    """

    cache: Cache
    padding: Int[Array, " batch"]
    variables: PyTree
    encoded: Float[Array, "batch source embed"] | None = None
    encoder_segments: Int[Array, "batch source"] | None = None


@struct.dataclass
class Generated:
    """Tokens chosen so far.

    Attributes:
      count: how many tokens a row has.
      tokens: the tokens; padding after a stop and from ``count`` on.
      stopped: rows that have ended.
    """

    count: Int[Array, ""]
    tokens: Int[Array, "batch new"]
    stopped: Bool[Array, " batch"]


@struct.dataclass
class Rules:
    """How tokens are chosen and where rows end: a key a row, the tokens that end it, and what stands after them."""

    sampling: Sampling
    rngs: Key[Array, " batch"]
    stops: Int[Array, " stops"]
    pad_id: Int[Array, ""] | int


def generate(
    model: Transformer,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    num_beams: int = 1,
    vocab_size: int | None = None,
    stop_ids: Iterable[int] = (),
    pad_id: int = 0,
    decoder_start_id: int = 0,
    bidirectional_prompt: bool = False,
    seed: int = 0,
) -> list[list[int]]:
    """Continues prompts (decoder), or answers them (encoder-decoder).

    Args:
      model: a model with an "lm" head and a decoder.
      params: its parameters, without axis metadata.
      prompts: token ids, at least one a prompt; the encoder's input where there are two stacks.
      max_new_tokens: most tokens generated a row.
      temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
      top_k: draw from the so many likeliest tokens; 0 from all.
      top_p: draw from the fewest tokens that hold this probability; 1 from all.
      num_beams: only 1 for now.
      vocab_size: ids from here on have no token and are not chosen.
      stop_ids: tokens that end a row.
      pad_id: fills what is not a token.
      decoder_start_id: what an encoder-decoder's decoder starts from.
      bidirectional_prompt: prompt tokens see each other in both directions (prefix LM).
      seed: of the random draws. Row i's draws are those of its own place, whatever the other rows are.

    Returns:
      The new tokens of each row; the stop token, where one came, is the last.

    Raises:
      LmxError: the model cannot generate, an argument is out of range, or a row would be longer than a learned
        position table.
    """
    _check_model(model.config, num_beams)
    sampling = make_sampling(temperature, top_k, top_p, vocab_size)
    _check_lengths(model.config, prompts, max_new_tokens)
    if not prompts:
        return []
    length = min(bucket(max(map(len, prompts))), _longest(model.config))
    tokens, segments = pad_prompts(prompts, length, pad_id, left=model.config.architecture == "decoder")
    room = bucket(max_new_tokens)
    logits, decoding = prefill(
        model,
        params,
        tokens,
        segments,
        new_slots=room,
        decoder_start_id=decoder_start_id,
        bidirectional_prompt=bidirectional_prompt,
    )
    stops = jnp.asarray(sorted(set(stop_ids)), jnp.int32)
    rules = Rules(sampling, _row_keys(seed, len(prompts)), stops, pad_id)
    generated, _ = _loop(model, params, _first(logits, rules, room), decoding, rules, max_new_tokens)
    return _trimmed(jax.device_get(generated.tokens)[:, :max_new_tokens], stop_ids)


@functools.partial(jax.jit, static_argnames=("model", "new_slots", "bidirectional_prompt"))
def prefill(
    model: Transformer,
    params: PyTree,
    tokens: Int[Array, "batch length"],
    segments: Int[Array, "batch length"],
    *,
    new_slots: int,
    decoder_start_id: int = 0,
    bidirectional_prompt: bool = False,
) -> tuple[Float[Array, "batch vocab"], Decoding]:
    """Runs the prompts in one pass.

    Args:
      tokens, segments: prompts, padded on the left for a decoder; segments are 1 for tokens and 0 for padding.
      new_slots: tokens there will be room for after the prompt.
      decoder_start_id, bidirectional_prompt: see :func:`generate`.

    Returns:
      Logits of the first new token, and the state that :func:`advance` goes on from.
    """
    encoded = encoder_segments = None
    if model.config.architecture == "encoder_decoder":
        batch = {"encoder_tokens": tokens, "encoder_segments": segments}
        encoded, encoder_segments = model.apply({"params": params}, batch, method="encode"), segments
        tokens = jnp.full((len(tokens), 1), decoder_start_id, jnp.int32)
        segments = jnp.ones_like(tokens)
    rows, length = tokens.shape
    room = ((0, 0), (0, new_slots))
    prefix = jnp.pad(segments, room) if bidirectional_prompt else None
    cache = Cache(jnp.zeros((), jnp.int32), jnp.pad(segments, room, constant_values=1), prefix)
    decoding = Decoding(cache, length - segments.sum(-1), {}, encoded, encoder_segments)
    return _forward(model, params, tokens, decoding)


def advance(
    model: Transformer, params: PyTree, tokens: Int[Array, " batch"], decoding: Decoding
) -> tuple[Float[Array, "batch vocab"], Decoding]:
    """Takes each row's next token in; returns the logits of the one after it and the new state."""
    return _forward(model, params, tokens[:, None], decoding)


def _forward(model, params, tokens, decoding):
    cache, length = decoding.cache, tokens.shape[1]
    positions = jnp.maximum(cache.index + jnp.arange(length) - decoding.padding[:, None], 0)
    if decoding.encoded is None:
        batch = {"tokens": tokens, "positions": positions}
    else:
        batch = {"decoder_tokens": tokens, "decoder_positions": positions}
        batch |= {"encoder_tokens": decoding.encoder_segments, "encoder_segments": decoding.encoder_segments}

    def last_logits(module):
        if decoding.encoded is None:
            hidden = module.hidden(batch, cache=cache)
        else:
            hidden = module.decode(batch, decoding.encoded, cache=cache)
        return module.lm_logits(hidden[:, -1])

    variables = {"params": params, **decoding.variables}
    logits, variables = model.apply(variables, method=last_logits, mutable=["cache"])
    return logits, decoding.replace(cache=cache.replace(index=cache.index + length), variables=variables)


@functools.partial(jax.jit, static_argnames="room")
def _first(logits: Float[Array, "batch vocab"], rules: Rules, room: int) -> Generated:
    rows = len(logits)
    tokens = jnp.full((rows, room), rules.pad_id, jnp.int32)
    return _with_next(Generated(jnp.zeros((), jnp.int32), tokens, jnp.zeros(rows, bool)), logits, rules)


@functools.partial(jax.jit, static_argnames="model", donate_argnames=("generated", "decoding"))
def _loop(
    model: Transformer,
    params: PyTree,
    generated: Generated,
    decoding: Decoding,
    rules: Rules,
    max_new_tokens: Int[Array, ""],
) -> tuple[Generated, Decoding]:
    """One token a turn until all rows have stopped. The cache is returned so that it can be updated in place."""

    def unfinished(carry):
        return (carry[0].count < max_new_tokens) & ~carry[0].stopped.all()

    def turn(carry):
        generated, decoding = carry
        logits, decoding = advance(model, params, generated.tokens[:, generated.count - 1], decoding)
        return _with_next(generated, logits, rules), decoding

    return jax.lax.while_loop(unfinished, turn, (generated, decoding))


def _with_next(generated: Generated, logits: Float[Array, "batch vocab"], rules: Rules) -> Generated:
    """One more token in every row that has not stopped."""
    count = generated.count
    rngs = jax.vmap(jax.random.fold_in, in_axes=(0, None))(rules.rngs, count)
    token = jnp.where(generated.stopped, rules.pad_id, choose(logits, rules.sampling, rngs))
    stopped = generated.stopped | (token[:, None] == rules.stops).any(-1)
    return Generated(count + 1, generated.tokens.at[:, count].set(token), stopped)


@functools.partial(jax.jit, static_argnames="rows")
def _row_keys(seed, rows):
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(rows))


def bucket(length: int) -> int:
    """The length that rows of ``length`` tokens are padded to: a power of two, above 64 a multiple of 64."""
    return -(-length // BUCKET) * BUCKET if length > BUCKET else 1 << (length - 1).bit_length()


def pad_prompts(
    prompts: Sequence[Sequence[int]], length: int, pad_id: int, *, left: bool
) -> tuple[Int[np.ndarray, "batch length"], Int[np.ndarray, "batch length"]]:
    """Tokens and segments (1 for tokens, 0 for padding) of prompts padded to ``length``."""
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    segments = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        place = slice(length - len(prompt), length) if left else slice(0, len(prompt))
        tokens[row, place], segments[row, place] = prompt, 1
    return tokens, segments


def _trimmed(rows: Any, stop_ids: Iterable[int]) -> list[list[int]]:
    """The rows as lists, each up to and with its first stop token."""
    ends = set(stop_ids)
    found = ((row, next((i for i, token in enumerate(row) if token in ends), len(row))) for row in rows.tolist())
    return [row[: end + 1] for row, end in found]


def _longest(config: Model) -> int:
    """Most positions that a row may have."""
    return config.max_length if config.position == "learned" else sys.maxsize


def _check_model(config: Model, num_beams: int) -> None:
    if config.architecture == "encoder":
        raise LmxError("an encoder reads text and cannot generate any; model.architecture must have a decoder.")
    if "lm" not in config.heads:
        raise LmxError(f"generating needs the head 'lm' in model.heads; this model has {config.heads}.")
    if num_beams != 1:
        raise LmxError(f"num_beams={num_beams} was asked for, but beam search is not available yet; use num_beams=1.")


def _check_lengths(config: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise LmxError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    if not all(len(prompt) for prompt in prompts):
        raise LmxError("a prompt is empty; generating starts from at least one token.")
    prompt = max(map(len, prompts), default=0)
    two = config.architecture == "encoder_decoder"
    needed = max(prompt, max_new_tokens) if two else prompt + max_new_tokens
    if needed > _longest(config):
        raise LmxError(
            f"a prompt of {prompt} tokens and {max_new_tokens} new ones do not fit model.max_length "
            f"({config.max_length}), the positions that the learned table holds; shorten the prompt or lower "
            "max_new_tokens."
        )
