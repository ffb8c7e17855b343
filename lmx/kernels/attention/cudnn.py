"""Attention by cuDNN's fused kernels, on NVIDIA GPUs."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmx.kernels.attention.mask import Mask, bias_matrix
from lmx.parallel.sharding import constrain

IMPLEMENTATION = "cudnn"  # of jax.nn.dot_product_attention
MULTIPLE = 16  # of widths: what a tensor core sums up at once
APART = 1024.0  # what is at least taken from the score of a query and a key of different segments


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
    of the query, [batch, 1, query, key]; with a bias see :func:`_biased`.
    """
    causal = mask.causal and mask.prefix is None
    run = functools.partial(jax.nn.dot_product_attention, is_causal=causal, scale=scale, implementation=IMPLEMENTATION)
    if bias is not None:
        return _biased(run, query, key, value, mask, scale, window, bias)
    allowed = None
    if not mask.whole or window or (mask.causal and not causal):
        allowed = mask.replace(causal=mask.causal and not causal).allowed(window)[:, None]
        allowed = constrain(allowed, "batch", None, None, None)
    return run(query, key, value, mask=allowed)


def _biased(run, query, key, value, mask, scale, window, bias):
    """With a bias by distance, without a prefix.

    The kernel has the gradient of a matrix [1, heads, query, key] alone, in which nothing can depend on the row. So
    heads are made wider by what tells segments apart: there, queries and keys of one segment have a product of zero,
    and others one that no score makes up for. It comes first, so that the sum of the rest begins from that zero.
    """
    matrix = bias_matrix(bias.astype(query.dtype), query.shape[1])
    if window:
        near = Mask(mask.query_segments, mask.key_segments, whole=True).allowed(window)
        matrix = jnp.where(near, matrix, jnp.finfo(matrix.dtype).min / 2)
    matrix = constrain(matrix[None], None, "heads", None, None)
    if mask.whole:
        return run(query, key, value, bias=matrix)
    queries, keys = mask.query_segments.shape[1], mask.key_segments.shape[1]
    bits, width = _bits(queries, keys), segment_width(queries, keys)
    size = 2.0 ** math.ceil(math.log2(APART / 2 / scale))  # two signs that differ take twice that; exact in 16 bits
    of_query = _signs(mask.query_segments, bits, width, size, -size)
    of_key = _signs(mask.key_segments, bits, width, 1.0, float(bits))
    query, key, wide = (
        jnp.concatenate([jnp.broadcast_to(signs.astype(x.dtype)[:, :, None], (*x.shape[:3], width)), x], axis=3)
        for x, signs in ((query, of_query), (key, of_key), (value, jnp.zeros_like(of_key)))
    )
    return run(query, key, wide, bias=matrix)[..., width:]


def segment_width(queries: int, keys: int) -> int:
    """How much wider heads become for the segments of rows of such lengths."""
    return -(-(_bits(queries, keys) + 1) // MULTIPLE) * MULTIPLE


def _bits(queries, keys):
    """Of the number of a segment, of which a row has as many as tokens at most."""
    return max(queries, keys).bit_length()


def _signs(
    segments: Int[Array, "batch length"], bits: int, width: int, size: float, constant: float
) -> Float[Array, "batch length width"]:
    """A number's bits as plus and minus ``size``, ``constant``, and zeros."""
    signs = jnp.where((segments[..., None] >> jnp.arange(bits)) & 1, size, -size)
    return jnp.pad(
        jnp.pad(signs, ((0, 0), (0, 0), (0, 1)), constant_values=constant), ((0, 0), (0, 0), (0, width - bits - 1))
    )
