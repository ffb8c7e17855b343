"""Products of activations and weights, whatever the weights are kept in and whatever is multiplied."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmx.kernels.eight_bits import eight_bit_product
from lmx.kernels.int8 import Quantized


def product(
    x: Float[Array, "..."], kernel: Float[Array, "..."] | Quantized, num_inputs: int = 1, numbers: str = "dtype"
) -> Float[Array, "..."]:
    """``x @ kernel`` over the last ``num_inputs`` axes of ``x`` and the first of ``kernel``, in the type of ``x``.

    A quantized kernel, which has a scale for each output, is converted as it is read, and the result is scaled.

    Args:
      numbers: that are multiplied: dtype: of the type of ``x``; else see
        :func:`lmx.kernels.eight_bits.eight_bit_product`.
    """
    if isinstance(kernel, Quantized):
        outputs = kernel.shape[num_inputs:]
        assert kernel.scale.size == math.prod(outputs), "a scale for each output"
        y = jnp.tensordot(x, kernel.values.astype(x.dtype), axes=num_inputs)
        return y * kernel.scale.reshape(outputs).astype(x.dtype)
    if numbers != "dtype":
        return eight_bit_product(x, kernel, num_inputs, numbers)
    return _product(num_inputs, x, kernel.astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(num_inputs: int, x: Array, kernel: Array) -> Array:
    return jnp.tensordot(x, kernel, axes=num_inputs)


def _forward(num_inputs, x, kernel):
    return _product(num_inputs, x, kernel), (x, kernel)


def _backward(num_inputs, residuals, gradient):
    """The gradient of the kernel sums over all rows, for which a CPU turns over one of the two that it is made of in
    memory. That is the narrower one here, whatever the order of the kernel's axes; JAX's rule goes by the order."""
    x, kernel = residuals
    rows, outputs = tuple(range(x.ndim - num_inputs)), tuple(range(num_inputs, kernel.ndim))
    places = tuple(range(gradient.ndim - len(outputs), gradient.ndim))
    of_x = jnp.tensordot(gradient, kernel, (places, outputs))
    if math.prod(kernel.shape[:num_inputs]) <= math.prod(kernel.shape[num_inputs:]):
        return of_x, jnp.tensordot(x, gradient, (rows, rows))
    turned = jnp.tensordot(gradient, x, (rows, rows))
    return of_x, turned.transpose(*range(len(outputs), kernel.ndim), *range(len(outputs)))


_product.defvjp(_forward, _backward)
