"""Which token comes next: pure functions on logits [batch, vocab]."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key

from lmx.errors import LmxError


@struct.dataclass
class Sampling:
    """How a token is chosen. The filters act in the order of the fields, after the temperature.

    Attributes:
      temperature: logits are divided by it; none takes the likeliest token always (greedy).
      top_p: see :func:`keep_top_p`; none keeps all.
      top_k: see :func:`keep_top_k`; 0 keeps all. A new value compiles anew; the others are traced.
      vocab_size: ids from here on have no token (a table padded for speed) and are never chosen; none: all have one.
    """

    temperature: Float[Array, ""] | float | None = None
    top_k: int = struct.field(pytree_node=False, default=0)
    top_p: Float[Array, ""] | float | None = None
    vocab_size: Int[Array, ""] | int | None = None


def make_sampling(
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, vocab_size: int | None = None
) -> Sampling:
    """Checks what a user asks for. Temperature 0 is greedy, top_k 0 and top_p 1 keep all tokens.

    Raises:
      LmxError: a number is out of range.
    """
    if temperature < 0:
        raise LmxError(f"temperature must be 0 (greedy) or more, not {temperature}.")
    if top_k < 0:
        raise LmxError(f"top_k must be a number of tokens, or 0 for all of them, not {top_k}.")
    if not 0 < top_p <= 1:
        raise LmxError(f"top_p must be a probability above 0 and at most 1 (all tokens), not {top_p}.")
    return Sampling(
        temperature=float(temperature) if temperature > 0 else None,
        top_k=top_k,
        top_p=float(top_p) if top_p < 1 else None,
        vocab_size=vocab_size,
    )


def keep_top_k(logits: Float[Array, "batch vocab"], k: int) -> Float[Array, "batch vocab"]:
    """All but the ``k`` highest logits of a row become -inf (Fan et al. 2018, section 5.4); what equals the k-th
    stays as well."""
    lowest = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "batch vocab"], p: Float[Array, ""] | float) -> Float[Array, "batch vocab"]:
    """Keeps the fewest tokens whose probabilities sum to at least ``p`` (nucleus, Holtzman et al. 2020, section 3.1),
    always at least one, and what equals the last of them; the others become -inf."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    last = jnp.maximum((before < p).sum(-1, keepdims=True) - 1, 0)
    lowest = jnp.take_along_axis(ordered, last, axis=-1)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def filtered_logits(logits: Float[Array, "batch vocab"], sampling: Sampling) -> Float[Array, "batch vocab"]:
    """The logits of the distribution that a token is drawn from, temperature and filters applied."""
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    return logits


def probabilities(logits: Float[Array, "*batch vocab"], sampling: Sampling) -> Float[Array, "*batch vocab"]:
    """The distribution that a token is drawn from; all of it on the likeliest where that is taken always."""
    logits, shape = with_tokens(logits, sampling).reshape(-1, logits.shape[-1]), logits.shape
    if sampling.temperature is None:
        return jax.nn.one_hot(likeliest(logits), shape[-1]).reshape(shape)
    return jax.nn.softmax(filtered_logits(logits, sampling), axis=-1).reshape(shape)


def with_tokens(logits: Float[Array, "*batch vocab"], sampling: Sampling) -> Float[Array, "*batch vocab"]:
    """The logits, of ids without a token -inf."""
    if sampling.vocab_size is None:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < sampling.vocab_size, logits, -jnp.inf)


def likeliest(logits: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """The id of each row's largest logit, the first of several; 0 where the largest is not a number.

    Two passes over the logits, because a CPU is slower at one that carries value and id along, as ``argmax`` does.
    """
    vocab = logits.shape[-1]
    is_top = logits == logits.max(-1, keepdims=True)
    return jnp.where(is_top, jnp.arange(vocab, dtype=jnp.int32), vocab).min(-1) % vocab


def choose(
    logits: Float[Array, "batch vocab"], sampling: Sampling, rngs: Key[Array, " batch"] | None
) -> Int[Array, " batch"]:
    """A token a row, the likeliest or a random one; ``rngs`` is a key a row and is not read when greedy."""
    logits = with_tokens(logits, sampling)
    if sampling.temperature is None:
        return likeliest(logits)
    return jax.vmap(jax.random.categorical)(rngs, filtered_logits(logits, sampling)).astype(jnp.int32)
