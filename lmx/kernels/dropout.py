"""Dropout (Srivastava et al. 2014) whose mask is computed where it is used, and not kept for the backward pass.

Whether a value stays is a function of its place and of a few random words. Drawing random bits for every value, as
``jax.random.bernoulli`` does it, is most of what dropout costs where there is no hardware for it.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

STEPS = 1 << 16


def dropout(key: Key[Array, ""], x: Float[Array, "..."], rate: float) -> Float[Array, "..."]:
    """Zero with probability ``rate``, rounded to 1/65,536; other values are divided by the probability of staying.

    The mask depends on the key and the shape alone, and not on how ``x`` lies on devices.
    """
    return stream_dropout(rate, stream_words(key, x.shape[:1] if x.ndim > 1 else ()), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def stream_dropout(rate: float, words: Int[Array, "*streams 2"], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """:func:`dropout` of streams of values: ``x`` has the axes of the streams, and then those of their values."""
    inner = x.shape[words.ndim - 1 :]
    index = jnp.zeros(inner, jnp.int32)
    for axis, size in enumerate(inner):
        index = index * size + jax.lax.broadcasted_iota(jnp.int32, inner, axis)
    first, second = (words[..., i].reshape(*words.shape[:-1], *[1] * len(inner)) for i in range(2))
    return (x * stream_factors(first, second, index, rate)).astype(x.dtype)


def _forward(rate, words, x):
    return stream_dropout(rate, words, x), words


def _backward(rate, words, gradient):
    return None, stream_dropout(rate, words, gradient)


stream_dropout.defvjp(_forward, _backward)


def stream_words(key: Key[Array, ""], shape: tuple[int, ...]) -> Int[Array, "... 2"]:
    """Random words for so many streams of :func:`stream_factors`."""
    return jax.lax.bitcast_convert_type(jax.random.bits(key, (*shape, 2), jnp.uint32), jnp.int32)


def stream_factors(
    first: Int[Array, "..."], second: Int[Array, "..."], index: Int[Array, "..."], rate: float
) -> Float[Array, "..."]:
    """What dropout multiplies value number ``index`` of a stream by: 0, or one over the probability of staying.

    Each is a function of its place alone, so that a kernel can have any of them at any time and keep none: a hash of
    32 bits (in the manner of Wellons 2018, "lowbias32", with the second word mixed in on the way) of the place and the
    stream's two words, in integers that every device has.
    """
    x = index ^ first
    x = _multiplied(x ^ jax.lax.shift_right_logical(x, 16), 0x7FEB352D)
    x = _multiplied(x ^ jax.lax.shift_right_logical(x, 15), 0x846CA68B) ^ second
    x = _multiplied(x ^ jax.lax.shift_right_logical(x, 16), 0x7FEB352D)
    draws = jax.lax.shift_right_logical(x, 16)
    dropped = round(rate * STEPS)
    return jnp.where(draws >= dropped, 1 / (1 - dropped / STEPS) if dropped < STEPS else 0.0, 0.0)


def _multiplied(x: Int[Array, "..."], factor: int) -> Int[Array, "..."]:
    return x * jnp.int32(factor - (1 << 32) if factor >= 1 << 31 else factor)
