"""Attention as the formula has it, with every weight there at once: for short rows, for decoding, and to look at."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lmx.kernels.attention.mask import Mask, bias_matrix
from lmx.kernels.dropout import stream_dropout, stream_words
from lmx.kernels.int8 import Quantized


def plain_attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch key kv_heads head_dim"] | Quantized,
    value: Float[Array, "batch key kv_heads head_dim"] | Quantized,
    mask: Mask,
    *,
    scale: float = 1.0,
    window: int = 0,
    bias: Float[Array, "heads distances"] | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Key[Array, ""] | None = None,
) -> Float[Array, "batch query heads head_dim"]:
    """``softmax(Q K^T scale + bias) V``; see :func:`lmx.kernels.attention.attention`."""
    weights = attention_weights(query, key, mask, scale=scale, window=window, bias=bias)
    if dropout_rate:
        weights = stream_dropout(dropout_rate, stream_words(dropout_rng, weights.shape[:2]), weights)
    batch, heads, queries, keys = weights.shape
    weights = weights.reshape(batch, value.shape[2], -1, queries, keys)
    if isinstance(value, Quantized):  # the scales are of weights then: values are only converted as they are read
        weights, value = weights * _by_key(value.scale), value.values
    weights, value = weights.astype(query.dtype), value.astype(query.dtype)
    output = jnp.einsum("bkgqs,bskd->bkgqd", weights, value)
    return output.transpose(0, 3, 1, 2, 4).reshape(query.shape)


def attention_weights(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch key kv_heads head_dim"] | Quantized,
    mask: Mask,
    *,
    scale: float = 1.0,
    window: int = 0,
    bias: Float[Array, "heads distances"] | None = None,
) -> Float[Array, "batch heads query key"]:
    """``softmax(Q K^T scale + bias)`` in float32, whatever the inputs are. A query that may see no key spreads its
    weight evenly over all of them."""
    batch, queries, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = (query * jnp.asarray(scale, query.dtype)).reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4)  # not left to einsum: it would put the larger factor first, turned over
    values = key.values if isinstance(key, Quantized) else key
    scores = jnp.einsum("bkgqd,bskd->bkgqs", grouped, values.astype(query.dtype), preferred_element_type=jnp.float32)
    if isinstance(key, Quantized):
        scores *= _by_key(key.scale)
    if bias is not None:
        matrix = bias_matrix(bias.astype(jnp.float32), queries)
        scores += matrix.reshape(1, kv_heads, heads // kv_heads, *matrix.shape[1:])
    scores = jnp.where(mask.allowed(window)[:, None, None], scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1).reshape(batch, heads, queries, -1)


def _by_key(scale: Float[Array, "batch key kv_heads 1"]) -> Float[Array, "batch kv_heads 1 1 key"]:
    return scale[..., 0].transpose(0, 2, 1)[:, :, None, None]
