"""Dropout (Srivastava et al. 2014) that draws 16 random bits a value.

Drawing them is most of what dropout costs where there is no hardware for it: by 32 bits and a conversion to a float32,
as ``jax.random.bernoulli`` does it, a mask takes several times as long on a CPU.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

STEPS = 1 << 16


def dropout(key: Key[Array, ""], x: Float[Array, "*outer last"], rate: float) -> Float[Array, "*outer last"]:
    """Zero with probability ``rate``, rounded to 1/65,536; other values are divided by the probability of staying.

    The mask depends on the key and the shape alone, and not on how ``x`` lies on devices.
    """
    dropped = round(rate * STEPS)
    if not 0 < dropped < STEPS:
        return x if dropped == 0 else jnp.zeros_like(x)
    *outer, last = x.shape
    words = jax.random.bits(key, (*outer, -(-last // 2)), jnp.uint32)
    draws = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*outer, -1)[..., :last]
    return jnp.where(draws >= dropped, x / (1 - dropped / STEPS), 0)


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
