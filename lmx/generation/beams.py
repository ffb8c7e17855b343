"""Beam search: the likeliest text among many, and not the likeliest token after each token.

As Wu et al. 2016, section 7, have it, with a text's score its log-likelihood over a power of its length (equation 14's
length normalization in its plain form), and as ``transformers`` decides when a row is done: when no running beam would,
if it ended now, be better than the worst of as many finished texts as there are beams.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

from lmx.generation.decode import Decoding, Rules, advance
from lmx.generation.sampling import with_tokens
from lmx.models.transformer import Transformer

WORST = -1e9  # of scores; sums with it stay finite


@struct.dataclass
class Beams:
    """Texts that go on and texts that have ended, the best first.

    Attributes:
      count: how many tokens running texts have.
      running, running_scores: texts that go on, and the logarithm of how likely each is.
      finished, finished_scores: texts that have ended, and their scores.
      can_improve: rows whose finished texts may still be bettered.
    """

    count: Int[Array, ""]
    running: Int[Array, "batch beams new"]
    running_scores: Float[Array, "batch beams"]
    finished: Int[Array, "batch beams new"]
    finished_scores: Float[Array, "batch beams"]
    can_improve: Bool[Array, " batch"]


@functools.partial(jax.jit, static_argnames=("model", "num_beams", "room"))
def search(
    model: Transformer,
    params: PyTree,
    logits: Float[Array, "batch vocab"],
    decoding: Decoding,
    rules: Rules,
    max_new_tokens: Int[Array, ""],
    length_penalty: Float[Array, ""],
    num_beams: int,
    room: int,
) -> Int[Array, "batch new"]:
    """The best text of each row; padding after its stop.

    Args:
      logits, decoding: of the prompts, see :func:`lmx.generation.decode.prefill`.
      length_penalty: the power of the length that a text's log-likelihood is divided by; 0 is none.
      num_beams: texts that are followed in a row.
      room: tokens there is room for.
    """
    rows = len(logits)
    texts = jnp.full((rows, num_beams, room), rules.pad_id, jnp.int32)
    worst = jnp.full((rows, num_beams), WORST)
    # All beams are the prompt at first: one of them is to be continued.
    beams = Beams(jnp.zeros((), jnp.int32), texts, worst.at[:, 0].set(0.0), texts, worst, jnp.ones(rows, bool))
    extend = functools.partial(_extended, rules=rules, most=max_new_tokens, length_penalty=length_penalty)
    beams, _ = extend(beams, jnp.repeat(logits[:, None], num_beams, axis=1))
    decoding = _of_rows(decoding, lambda x, axis: jnp.repeat(x, num_beams, axis))

    def unfinished(carry):
        return (carry[0].count < max_new_tokens) & carry[0].can_improve.any()

    def turn(carry):
        beams, decoding = carry
        logits, decoding = advance(model, params, beams.running[:, :, beams.count - 1].reshape(-1), decoding)
        beams, parents = extend(beams, logits.reshape(rows, num_beams, -1))
        places = (jnp.arange(rows)[:, None] * num_beams + parents).reshape(-1)
        return beams, _of_rows(decoding, lambda x, axis: jnp.take(x, places, axis))

    beams, _ = jax.lax.while_loop(unfinished, turn, (beams, decoding))
    return beams.finished[:, 0]


def _extended(
    beams: Beams,
    logits: Float[Array, "batch beams vocab"],
    rules: Rules,
    most: Int[Array, ""],
    length_penalty: Float[Array, ""],
) -> tuple[Beams, Int[Array, "batch beams"]]:
    """One more token in every running text; and which of the running ones each of the new ones goes on from."""
    rows, num_beams, vocab = logits.shape
    scores = jax.nn.log_softmax(with_tokens(logits, rules.sampling), axis=-1) + beams.running_scores[..., None]
    # As many as are sure to hold a beam's worth that do not end.
    scores, places = jax.lax.top_k(scores.reshape(rows, -1), max(2, 1 + rules.stops.size) * num_beams)
    parents, tokens = places // vocab, (places % vocab).astype(jnp.int32)
    texts = jnp.take_along_axis(beams.running, parents[..., None], axis=1).at[:, :, beams.count].set(tokens)
    count = beams.count + 1
    ends = (tokens[..., None] == rules.stops).any(-1) | (count >= most)

    among_best = jnp.arange(scores.shape[1]) < num_beams
    joins = ends & among_best & beams.can_improve[:, None]
    ended = jnp.where(joins, scores / count.astype(jnp.float32) ** length_penalty, WORST)
    finished_scores, order = jax.lax.top_k(jnp.concatenate([beams.finished_scores, ended], axis=1), num_beams)
    finished = jnp.take_along_axis(jnp.concatenate([beams.finished, texts], axis=1), order[..., None], axis=1)

    running_scores, order = jax.lax.top_k(scores + WORST * ends, num_beams)
    running = jnp.take_along_axis(texts, order[..., None], axis=1)
    hoped = running_scores[:, 0] / count.astype(jnp.float32) ** length_penalty
    can_improve = beams.can_improve & (hoped > finished_scores[:, -1])
    beams = Beams(count, running, running_scores, finished, finished_scores, can_improve)
    return beams, jnp.take_along_axis(parents, order, axis=1)


def _of_rows(decoding: Decoding, function: Callable[[Array, int], Array]) -> Decoding:
    """``decoding`` with what belongs to rows as ``function`` has it, which is given an array and the axis of rows."""

    def first(x):
        return None if x is None else function(x, 0)

    def stored(x):  # [batch, kv_heads, slots, head_dim], stacked where layers are scanned
        x = x if decoding.cache.has_rows else jnp.expand_dims(x, x.ndim - 3)
        return function(x, x.ndim - 4)

    cache = decoding.cache.replace(segments=first(decoding.cache.segments), prefix=first(decoding.cache.prefix))
    return decoding.replace(
        cache=cache,
        padding=first(decoding.padding),
        variables=jax.tree.map(stored, decoding.variables),
        encoded=first(decoding.encoded),
        encoder_segments=first(decoding.encoder_segments),
    )
