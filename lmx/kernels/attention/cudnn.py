"""Attention by cuDNN's fused kernels, on NVIDIA GPUs."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from lmx.kernels.attention.blockwise import gradient_of_bias
from lmx.kernels.attention.mask import Mask, bias_matrix
from lmx.parallel.sharding import constrain

IMPLEMENTATION = "cudnn"  # of jax.nn.dot_product_attention


def cudnn_attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch key kv_heads head_dim"],
    value: Float[Array, "batch key kv_heads head_dim"],
    mask: Mask,
    *,
    scale: float = 1.0,
    window: int = 0,
    bias: Float[Array, "heads distances"] | None = None,
) -> Float[Array, "batch query heads head_dim"]:
    """Attention of whole rows, bfloat16 or float16; see :func:`lmx.kernels.attention.attention`.

    The order is the kernel's own, which skips what it forbids. Segments, windows and prefixes are a matrix in the type
    of the query, [batch, 1, query, key], or with a bias [batch, heads, query, key]. Of such a matrix the kernel has no
    gradient for a bias that rows share; it is computed beside the kernel, a block of queries at a time.
    """
    causal = mask.causal and mask.prefix is None
    run = functools.partial(
        jax.nn.dot_product_attention, query, key, value, is_causal=causal, scale=scale, implementation=IMPLEMENTATION
    )
    allowed = None
    if not mask.whole or window or (mask.causal and not causal):
        allowed = constrain(
            mask.replace(causal=mask.causal and not causal).allowed(window)[:, None], "batch", None, None, None
        )
    if bias is None:
        return run(mask=allowed)
    bias = bias.astype(query.dtype)
    matrix = constrain(bias_matrix(bias, query.shape[1])[None], None, "heads", None, None)
    if allowed is None:
        return run(bias=matrix)
    output = run(bias=jax.lax.stop_gradient(matrix), mask=allowed)
    return _with_gradient_of_bias((scale, window, mask.causal), output, bias, (query, key, value, mask.rows()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradient_of_bias(options: tuple[float, int, bool], output: Array, bias: Array, made_of: Any) -> Array:
    """``output`` as it is; what it is ``made_of`` has its gradient from the kernel."""
    return output


def _forward(options, output, bias, made_of):
    return output, (output, bias, made_of)


def _backward(options, residuals, gradient):
    output, bias, (query, key, value, rows) = residuals
    scale, window, causal = options
    mask = Mask(**rows, causal=causal)
    of_bias = gradient_of_bias(query, key, value, mask, bias, output, gradient, scale=scale, window=window)
    return gradient, of_bias, None


_with_gradient_of_bias.defvjp(_forward, _backward)
