"""Dropout (Srivastava et al. 2014) that draws 16 random bits a value.

Drawing them is most of what dropout costs where there is no hardware for it: by 32 bits and a conversion to a float32,
as ``jax.random.bernoulli`` does it, a mask takes several times as long on a CPU.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

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
