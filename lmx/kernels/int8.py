"""Eight bits a number: integers and a scale for each row or column of them (Dettmers et al. 2022, section 2.1).

What a product reads is converted as it is read, and its result is scaled: memory, and the time to read it, are a
quarter of float32's or half of bfloat16's.
"""

import functools
import math
from collections.abc import Sequence

import jax
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


def product(
    x: Float[Array, "..."], kernel: Float[Array, "..."] | Quantized, num_inputs: int = 1
) -> Float[Array, "..."]:
    """``x @ kernel`` over the last ``num_inputs`` axes of ``x`` and the first of ``kernel``, in the type of ``x``; a
    quantized kernel has a scale for each output."""
    if not isinstance(kernel, Quantized):
        return _float_product(num_inputs, x, kernel.astype(x.dtype))
    y = jnp.tensordot(x, kernel.values.astype(x.dtype), axes=num_inputs)
    outputs = kernel.shape[num_inputs:]
    assert kernel.scale.size == math.prod(outputs), "a scale for each output"
    return y * kernel.scale.reshape(outputs).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _float_product(num_inputs: int, x: Array, kernel: Array) -> Array:
    """The product; backward, the gradient of the kernel is one too, in the kernel's own order of axes, where JAX's rule
    would have it turned over in memory afterwards."""
    places, inputs = tuple(range(x.ndim - num_inputs, x.ndim)), tuple(range(num_inputs))
    return jax.lax.dot_general(x, kernel, ((places, inputs), ((), ())))


def _forward(num_inputs, x, kernel):
    return _float_product(num_inputs, x, kernel), (x, kernel)


def _backward(num_inputs, residuals, gradient):
    x, kernel = residuals
    rows, outputs = tuple(range(x.ndim - num_inputs)), tuple(range(num_inputs, kernel.ndim))
    places = tuple(range(gradient.ndim - len(outputs), gradient.ndim))
    of_x = jnp.tensordot(gradient, kernel, (places, outputs))
    if math.prod(kernel.shape[:num_inputs]) <= math.prod(kernel.shape[num_inputs:]):
        return of_x, jnp.tensordot(x, gradient, (rows, rows))
    turned = jnp.tensordot(gradient, x, (rows, rows))
    return of_x, turned.transpose(*range(len(outputs), kernel.ndim), *range(len(outputs)))


_float_product.defvjp(_forward, _backward)
