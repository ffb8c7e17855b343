"""Attention by cuDNN's fused kernels, on NVIDIA GPUs."""

import jax
from jaxtyping import Array, Float

from lmx.kernels.attention.mask import Mask


def cudnn_attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch key kv_heads head_dim"],
    value: Float[Array, "batch key kv_heads head_dim"],
    mask: Mask,
    *,
    scale: float = 1.0,
    window: int = 0,
) -> Float[Array, "batch query heads head_dim"]:
    """Attention of whole rows, bfloat16 or float16; see :func:`lmx.kernels.attention.attention`.

    The order is the kernel's own, which skips what it forbids; segments, windows and prefixes are a matrix of [batch,
    1, query, key] in the type of the query, where a mask has them.
    """
    causal = mask.causal and mask.prefix is None
    if mask.whole and not window and (causal or not mask.causal):
        matrix = None
    else:
        matrix = mask.replace(causal=mask.causal and not causal).allowed(window)[:, None]
    return jax.nn.dot_product_attention(
        query, key, value, mask=matrix, is_causal=causal, scale=scale, implementation="cudnn"
    )
