"""Eight bits a number: integers and a scale for each row or column of them (Dettmers et al. 2022, section 2.1).

This is how numbers are kept: memory, and the time to read it, are a quarter of float32's or half of bfloat16's.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Int8

LARGEST = 127


@struct.dataclass
class Quantized:
    """Numbers that are ``values * scale``.

    Attributes:
      values: the integers, -127 to 127.
      scale: with as many axes; 1 long where one scale is for all.
    """

    values: Int8[Array, "..."]
    scale: Float[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        return self.values.shape

    def __getitem__(self, ids: Int[Array, "..."]) -> Float[Array, "... columns"]:
        """Rows of a matrix with a scale a row."""
        return self.values[ids] * self.scale[ids]

    def dense(self, dtype: str | jnp.dtype) -> Float[Array, "..."]:
        """The numbers in a floating-point type."""
        return (self.values * self.scale).astype(dtype)


def quantize(x: Float[Array, "..."], axes: Sequence[int]) -> Quantized:
    """``x`` to the nearest integers, with one scale for what differs in ``axes`` only: its largest magnitude is 127."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axes, keepdims=True), jnp.finfo(jnp.float32).tiny) / LARGEST
    return Quantized(jnp.round(x / scale).astype(jnp.int8), scale)


def dense(x: Float[Array, "..."] | Quantized, dtype: str | jnp.dtype) -> Float[Array, "..."]:
    """``x`` in a floating-point type, whether it is quantized or not."""
    return x.dense(dtype) if isinstance(x, Quantized) else x.astype(dtype)
