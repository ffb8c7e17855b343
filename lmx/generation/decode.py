"""Decoding with a cache of keys and values.

Prompts of unequal length are padded on the *left*, so that in every row the last prompt token stands in the same
slot and all rows go on together. The whole loop is on the device and ends when every row has stopped.

A Switch layer's capacity counts slots, padding included: a long prompt that overflows an expert can drop fewer
tokens here than in a forward pass over it alone.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from lmx.generation.sampling import Sampling, choose
from lmx.models.attention import Cache
from lmx.models.transformer import Transformer


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


@functools.partial(jax.jit, static_argnames=("model", "new_slots", "bidirectional_prompt", "int8_cache"))
def prefill(
    model: Transformer,
    params: PyTree,
    tokens: Int[Array, "batch length"],
    segments: Int[Array, "batch length"],
    *,
    new_slots: int,
    decoder_start_id: int = 0,
    bidirectional_prompt: bool = False,
    int8_cache: bool = False,
) -> tuple[Float[Array, "batch vocab"], Decoding]:
    """Runs the prompts in one pass.

    Args:
      tokens, segments: prompts, padded on the left for a decoder; segments are 1 for tokens and 0 for padding.
      new_slots: tokens there will be room for after the prompt.
      decoder_start_id, bidirectional_prompt, int8_cache: see :func:`lmx.generation.generate.generate`.

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
    cache = Cache(None, jnp.pad(segments, room, constant_values=1), prefix, int8_cache)
    decoding = Decoding(cache, length - segments.sum(-1), {}, encoded, encoder_segments)
    logits, decoding = forward(model, params, tokens, decoding)
    return logits[:, -1], decoding


def advance(
    model: Transformer, params: PyTree, tokens: Int[Array, " batch"], decoding: Decoding
) -> tuple[Float[Array, "batch vocab"], Decoding]:
    """Takes each row's next token in; returns the logits of the one after it and the new state."""
    logits, decoding = forward(model, params, tokens[:, None], decoding)
    return logits[:, -1], decoding


def forward(
    model: Transformer, params: PyTree, tokens: Int[Array, "batch length"], decoding: Decoding, scored: int = 1
) -> tuple[Float[Array, "batch scored vocab"], Decoding]:
    """Takes several tokens of each row in; returns the logits after each of the last ``scored``, and the new state."""
    cache, length = decoding.cache, tokens.shape[1]
    first = 0 if cache.index is None else cache.index
    positions = jnp.maximum(first + jnp.arange(length) - decoding.padding[:, None], 0)
    if decoding.encoded is None:
        batch = {"tokens": tokens, "positions": positions}
    else:
        batch = {"decoder_tokens": tokens, "decoder_positions": positions}
        batch |= {"encoder_tokens": decoding.encoder_segments, "encoder_segments": decoding.encoder_segments}

    def logits_of(module):
        if decoding.encoded is None:
            hidden = module.hidden(batch, cache=cache)
        else:
            hidden = module.decode(batch, decoding.encoded, cache=cache)
        return module.lm_logits(hidden[:, -scored:])

    variables = {"params": params, **decoding.variables}
    logits, variables = model.apply(variables, method=logits_of, mutable=["cache"])
    return logits, decoding.replace(
        cache=cache.replace(index=jnp.asarray(first + length, jnp.int32)), variables=variables
    )


@functools.partial(jax.jit, static_argnames="room")
def first(logits: Float[Array, "batch vocab"], rules: Rules, room: int) -> Generated:
    """The first token of each row, with room for so many."""
    rows = len(logits)
    tokens = jnp.full((rows, room), rules.pad_id, jnp.int32)
    return with_next(Generated(jnp.zeros((), jnp.int32), tokens, jnp.zeros(rows, bool)), logits, rules)


@functools.partial(jax.jit, static_argnames="model", donate_argnames=("generated", "decoding"))
def loop(
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
        return with_next(generated, logits, rules), decoding

    return jax.lax.while_loop(unfinished, turn, (generated, decoding))


def with_next(generated: Generated, logits: Float[Array, "batch vocab"], rules: Rules) -> Generated:
    """One more token in every row that has not stopped."""
    count = generated.count
    rngs = jax.vmap(jax.random.fold_in, in_axes=(0, None))(rules.rngs, count)
    token = jnp.where(generated.stopped, rules.pad_id, choose(logits, rules.sampling, rngs))
    stopped = generated.stopped | (token[:, None] == rules.stops).any(-1)
    return Generated(count + 1, generated.tokens.at[:, count].set(token), stopped)
