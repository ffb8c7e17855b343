"""Products of activations and weights, whatever the weights are kept in and whatever is multiplied."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from lmx.kernels.eight_bits import eight_bit_product
from lmx.kernels.int8 import Quantized
from lmx.parallel.sharding import current_layout

FEW_ROWS = 64  # of a product that a CPU does faster with the activations turned


@struct.dataclass
class Turned:
    """A kernel whose outputs come before its inputs.

    Attributes:
      kernel: [outputs ..., inputs ...]; quantized, its scales have the same order.
    """

    kernel: Float[Array, "..."] | Quantized

    @classmethod
    def of(cls, kernel: Float[Array, "..."] | Quantized, num_inputs: int) -> "Turned":
        """A kernel with ``num_inputs`` axes of inputs before its outputs."""
        inputs = range(num_inputs)
        return cls(jax.tree.map(lambda x: jnp.moveaxis(x, inputs, range(x.ndim - num_inputs, x.ndim)), kernel))


def product(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."] | Quantized | Turned,
    num_inputs: int = 1,
    numbers: str = "dtype",
) -> Float[Array, "..."]:
    """``x @ kernel`` over the last ``num_inputs`` axes of ``x`` and the first of ``kernel``, in the type of ``x``.

    A quantized kernel, which has a scale for each output, is converted as it is read, and the result is scaled.

    Args:
      numbers: that are multiplied: dtype: of the type of ``x``; else see
        :func:`lmx.kernels.eight_bits.eight_bit_product`. A turned kernel has no other.
    """
    if isinstance(kernel, Turned):
        return _turned_product(x, kernel.kernel, num_inputs)
    if isinstance(kernel, Quantized):
        outputs = kernel.shape[num_inputs:]
        assert kernel.scale.size == math.prod(outputs), "a scale for each output"
        y = jnp.tensordot(x, kernel.values.astype(x.dtype), axes=num_inputs)
        return y * kernel.scale.reshape(outputs).astype(x.dtype)
    if numbers != "dtype":
        return eight_bit_product(x, kernel, num_inputs, numbers)
    return _product(num_inputs, x, kernel)


def product_by_rows(
    x: Float[Array, "... inputs"], kernel: Float[Array, "outputs inputs"], dtype: str | jnp.dtype | None = None
) -> Float[Array, "... outputs"]:
    """``x @ kernel.T``.

    A CPU's library reads the first factor of a product as it stands and copies the second into blocks. For few rows of
    ``x`` that copying would be most of the work, if the kernel were the second: so it comes first, and the result is
    turned. The barrier keeps XLA from making one product of the two steps again.

    Args:
      dtype: of the result; none: that of ``x``.
    """
    rows = math.prod(x.shape[:-1])
    on_cpu = jax.default_backend() == "cpu" and current_layout() is None
    if not (on_cpu and 1 < rows <= FEW_ROWS):
        return jnp.einsum("...i,oi->...o", x, kernel, preferred_element_type=dtype)
    turned = jnp.einsum("oi,ri->or", kernel, x.reshape(rows, -1), preferred_element_type=dtype)
    return jax.lax.optimization_barrier(turned).T.reshape(*x.shape[:-1], -1)


def _turned_product(x: Array, kernel: Array | Quantized, num_inputs: int) -> Array:
    values = kernel.values if isinstance(kernel, Quantized) else kernel
    outputs, inputs = values.shape[:-num_inputs], math.prod(values.shape[-num_inputs:])
    rows = x.reshape(*x.shape[:-num_inputs], inputs)
    y = product_by_rows(rows, values.reshape(-1, inputs).astype(x.dtype)).reshape(*rows.shape[:-1], *outputs)
    return y * kernel.scale.reshape(outputs).astype(x.dtype) if isinstance(kernel, Quantized) else y


def flat(x: Array, count: int) -> Array:
    """``x`` with its last ``count`` axes as one, which is the form to keep for backward: a TPU pads the last axis to
    128 numbers, and heads of 64 would take twice their room."""
    return x.reshape(*x.shape[: x.ndim - count], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(num_inputs: int, x: Array, kernel: Array) -> Array:
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=num_inputs)


def _forward(num_inputs, x, kernel):
    """The kernel is kept as it came: a loop over layers keeps none then, but reads the parameters again."""
    return _product(num_inputs, x, kernel), (flat(x, num_inputs), kernel)


def _backward(num_inputs, residuals, gradient):
    """The gradient of the kernel sums over all rows, for which a CPU turns over one of the two that it is made of in
    memory. That is the narrower one here, whatever the order of the kernel's axes; JAX's rule goes by the order."""
    x, kernel = residuals
    x = x.reshape(*x.shape[:-1], *kernel.shape[:num_inputs])
    rows, outputs = tuple(range(x.ndim - num_inputs)), tuple(range(num_inputs, kernel.ndim))
    places = tuple(range(gradient.ndim - len(outputs), gradient.ndim))
    of_x = jnp.tensordot(gradient, kernel.astype(x.dtype), (places, outputs))
    if math.prod(kernel.shape[:num_inputs]) <= math.prod(kernel.shape[num_inputs:]):
        return of_x, jnp.tensordot(x, gradient, (rows, rows)).astype(kernel.dtype)
    turned = jnp.tensordot(gradient, x, (rows, rows)).astype(kernel.dtype)
    return of_x, turned.transpose(*range(len(outputs), kernel.ndim), *range(len(outputs)))


_product.defvjp(_forward, _backward)
