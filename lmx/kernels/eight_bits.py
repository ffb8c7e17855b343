"""Products of matrices that are rounded to eight bits for it, in training.

An operand has a scale for each row of the activations and each output of the weights. The gradient by the activations
is such a product too; that by the weights, which sums over all tokens of a batch, keeps its type: "SwitchBack" of
Wortsman et al. 2023 (algorithm 1), here also with the formats of Micikevicius et al. 2022 (section 3). What is learned
stays float32. Rounding and products are those of the library qwix.
"""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmx.errors import missing_extra

FORMATS: dict[str, tuple[Any, Any]] = {  # of what is multiplied forward, and of gradients
    "int8": (jnp.int8, jnp.int8),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
}


def library() -> ModuleType:
    """qwix.

    Raises:
      LmxError: it is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise missing_extra("qwix", "quantized", "model.products of int8 or fp8") from error
    return qwix


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def eight_bit_product(
    x: Float[Array, "..."], kernel: Float[Array, "..."], num_inputs: int, form: str
) -> Float[Array, "..."]:
    """``x @ kernel`` over the last ``num_inputs`` axes of ``x`` and the first of ``kernel``, in the type of ``x``.

    Args:
      form: int8 or fp8.

    Raises:
      LmxError: the library is not installed.
    """
    inputs = range(num_inputs)
    rounded = FORMATS[form][0]
    return _product(x, rounded, [x.ndim - num_inputs + i for i in inputs], kernel, rounded, list(inputs))


def _forward(x, kernel, num_inputs, form):
    return eight_bit_product(x, kernel, num_inputs, form), (x, kernel)


def _backward(num_inputs, form, residuals, gradient):
    x, kernel = residuals
    rows, (rounded, rounded_gradient) = x.ndim - num_inputs, FORMATS[form]
    outputs = range(num_inputs, kernel.ndim)
    places = [rows + i for i in range(len(outputs))]
    of_x = _product(gradient, rounded_gradient, places, kernel, rounded, list(outputs))
    of_kernel = jnp.tensordot(x, gradient, (list(range(rows)),) * 2, preferred_element_type=jnp.float32)
    return of_x, of_kernel.astype(kernel.dtype)


eight_bit_product.defvjp(_forward, _backward)


def _product(x: Array, x_type: Any, x_axes: list[int], kernel: Array, kernel_type: Any, axes: list[int]) -> Array:
    """The product over these axes, each rounded with one scale for all of what is summed over."""
    qwix = library()
    rounded = [
        qwix.quantize(a.astype(jnp.float32), kind, channelwise_axes=[i for i in range(a.ndim) if i not in summed])
        for a, kind, summed in ((x, x_type, x_axes), (kernel, kernel_type, axes))
    ]
    return qwix.dot_general(*rounded, ((x_axes, axes), ((), ()))).astype(x.dtype)
