"""Attention a block of queries at a time: memory grows with the length and not with its square.

The backward pass computes a block's weights again, from the logarithm of what they were divided by (Rabe & Staats
2021; Dao et al. 2022, section 3.1). Keys that no query of a block may see, for the order or the window, are not
looked at. It is plain JAX: it runs, and is split over devices, wherever matmuls are.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from lmx.kernels.attention.mask import Mask, allowed, bias_matrix
from lmx.kernels.dropout import stream_factors, stream_words

BLOCK = 256  # queries at a time
BANDS = 8  # of blocks with one number of keys each; a causal row of many blocks wastes at most 1/8 of its work
FLOAT32: dict[str, Any] = {"preferred_element_type": jnp.float32}
NOTHING = jnp.finfo(jnp.float32).min  # the score of a key that may not be seen


def blockwise_attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch key kv_heads head_dim"],
    value: Float[Array, "batch key kv_heads head_dim"],
    mask: Mask,
    *,
    scale: float = 1.0,
    window: int = 0,
    bias: Float[Array, "heads distances"] | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Key[Array, ""] | None = None,
    block: int = BLOCK,
) -> Float[Array, "batch query heads head_dim"]:
    """Attention of whole rows; see :func:`lmx.kernels.attention.attention`.

    Args:
      block: queries at a time.
    """
    batch, queries, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    options, rows = _cut(mask, window, block, dropout_rate)
    scaled = _by_head(query * jnp.asarray(scale, query.dtype), kv_heads, options)
    if bias is not None:
        bias = _padded_bias(bias, kv_heads, queries, options)
    words = None
    if dropout_rate:
        words = stream_words(dropout_rng, (batch, heads)).reshape(batch, kv_heads, -1, 1, 1, 2)
    output = _attention(options, scaled, *(x.transpose(0, 2, 1, 3) for x in (key, value)), bias, (rows, words))
    return output.transpose(0, 3, 1, 2, 4).reshape(batch, -1, heads, head_dim)[:, :queries]


@dataclasses.dataclass(frozen=True)
class _Band:
    """Blocks of queries that look at equally many keys.

    Attributes:
      first: of its queries.
      blocks: how many blocks it has.
      width: keys that each of them looks at.
      back: the first of those keys is so many places before the block, or as near to that as the row allows.
    """

    first: int
    blocks: int
    width: int
    back: int


@dataclasses.dataclass(frozen=True)
class _Options:
    bands: tuple[_Band, ...]
    block: int
    window: int
    causal: bool
    whole: bool
    dropout_rate: float


def _bands(queries: int, keys: int, block: int, ahead: bool, window: int) -> tuple[_Band, ...]:
    """The blocks of ``queries`` by the keys that they need; ``ahead``: later ones as well."""
    blocks = queries // block
    if window:
        back = window - 1
        return (_Band(0, blocks, min(keys, back + block + (back if ahead else 0)), back),)
    if ahead:
        return (_Band(0, blocks, keys, queries),)
    ends = sorted({-(-blocks * (i + 1) // BANDS) for i in range(BANDS)})
    return tuple(
        _Band(start * block, end - start, min(keys, end * block), queries)
        for start, end in zip([0, *ends], ends, strict=False)
        if end > start
    )


def _cut(mask: Mask, window: int, block: int, dropout_rate: float = 0.0) -> tuple[_Options, dict[str, Array]]:
    """How a mask's rows are computed, and what it says of each token with queries padded to whole blocks."""
    rows = mask.rows()
    queries, keys = rows["query_segments"].shape[1], rows["key_segments"].shape[1]
    block = min(block, queries)
    more = -queries % block
    rows["query_segments"] = jnp.pad(rows["query_segments"], ((0, 0), (0, more)))
    bands = _bands(queries + more, keys, block, not mask.causal or mask.prefix is not None, window)
    return _Options(bands, block, window, mask.causal, mask.whole, dropout_rate), rows


def _by_head(x: Array, kv_heads: int, options: _Options) -> Array:
    """[batch, query, heads, …] as [batch, kv_heads, group, query, …], padded to whole blocks."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % options.block), (0, 0), (0, 0)))
    return x.reshape(*x.shape[:2], kv_heads, x.shape[2] // kv_heads, -1).transpose(0, 2, 3, 1, 4)


def _padded_bias(bias: Array, kv_heads: int, queries: int, options: _Options) -> Array:
    """[heads, distances] as float32 [kv_heads, group, distances], with those of padding."""
    padded = jnp.pad(bias.astype(jnp.float32), ((0, 0), (-queries % options.block, 0)))
    return padded.reshape(kv_heads, bias.shape[0] // kv_heads, -1)


def _delta(gradient: Array, output: Array) -> Array:
    """Each query's weights times their gradients, summed: a part of softmax's backward pass (Dao et al. 2022, B.4)."""
    return (gradient.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1, keepdims=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: _Options, query: Array, key: Array, value: Array, bias: Array | None, extra: PyTree) -> Array:
    """Query, scaled, [batch, kv_heads, group, query, head_dim]; key and value [batch, kv_heads, key, head_dim]; bias
    [kv_heads, group, distances]; ``extra``: what the mask says of each token, and the words of dropout."""
    return _forward(options, query, key, value, bias, extra)[0]


def _forward(options: _Options, query, key, value, bias, extra):
    def one(carry, first, band):
        block = _Block.of(options, band, first, query, key, value, extra)
        weights, total, log_total = block.softmax(bias)
        dropped = block.dropped(weights).astype(value.dtype)
        output = jnp.einsum("bkgqs,bksd->bkgqd", dropped, block.value, **FLOAT32)
        output = jnp.where(log_total < jnp.inf, output / total, 0).astype(query.dtype)
        return carry, (output, log_total)

    _, (output, log_total) = _over_blocks(options, one, ())
    return output, (query, key, value, bias, extra, output, log_total)


def _backward(options: _Options, residuals, gradient):
    query, key, value, bias, extra, output, log_total = residuals
    delta = _delta(gradient, output)

    def one(sums, first, band):
        block = _Block.of(options, band, first, query, key, value, extra)
        own_total = block.cut(log_total)
        weights, own, of_scores, back_to_bias = block.backward(bias, own_total, delta, gradient)
        of_value = jnp.einsum("bkgqs,bkgqd->bksd", block.dropped(weights).astype(own.dtype), own, **FLOAT32)
        low = of_scores.astype(key.dtype)
        of_query = jnp.einsum("bkgqs,bksd->bkgqd", low, block.key, **FLOAT32)
        of_key = jnp.einsum("bkgqs,bkgqd->bksd", low, block.query, **FLOAT32)
        sums = dict(sums, key=block.added(sums["key"], of_key), value=block.added(sums["value"], of_value))
        if bias is not None:
            sums["bias"] += back_to_bias(of_scores)[0]
        return sums, (of_query.astype(query.dtype),)

    sums = {"key": jnp.zeros(key.shape, jnp.float32), "value": jnp.zeros(value.shape, jnp.float32)}
    if bias is not None:
        sums["bias"] = jnp.zeros_like(bias)
    sums, (of_query,) = _over_blocks(options, one, sums)
    return of_query, sums["key"].astype(key.dtype), sums["value"].astype(value.dtype), sums.get("bias"), None


_attention.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class _Block:
    """A block of queries and the keys it looks at; what places the two have."""

    query: Array
    key: Array
    value: Array
    mask: Mask
    first: Array | int
    first_key: Array | int
    distance: Array | int  # where its biases begin
    words: Array | None
    keys: int  # of the whole row
    options: _Options

    @classmethod
    def of(cls, options, band, first, query, key, value, extra) -> "_Block":
        rows, words = extra
        keys, width = key.shape[2], band.width
        first_key = jnp.clip(first - band.back, 0, keys - width) if width < keys and band.back < query.shape[3] else 0
        cut = jax.lax.dynamic_slice_in_dim
        rows = {
            name: cut(row, first, options.block, 1) if name == "query_segments" else cut(row, first_key, width, 1)
            for name, row in rows.items()
        }
        mask = Mask(**rows, causal=options.causal, whole=options.whole)
        query = cut(query, first, options.block, 3)
        key, value = (cut(x, first_key, width, 2) for x in (key, value))
        distance = first_key - first - options.block + extra[0]["query_segments"].shape[1]
        return cls(query, key, value, mask, first, first_key, distance, words, keys, options)

    def scores(self, bias: Array | None) -> Array:
        """[batch, kv_heads, group, block, width], float32."""
        queries, keys = self.query.shape[3], self.key.shape[2]
        scores = jnp.einsum("bkgqd,bksd->bkgqs", self.query, self.key, **FLOAT32)
        if bias is not None:
            own = jax.lax.dynamic_slice_in_dim(bias, self.distance, queries + keys - 1, 2)
            matrix = bias_matrix(own.reshape(-1, own.shape[2]), queries)
            scores += matrix.reshape(*own.shape[:2], *matrix.shape[1:])
        return jnp.where(allowed(self.mask, *self.places(), self.options.window)[:, None, None], scores, NOTHING)

    def softmax(self, bias: Array | None) -> tuple[Array, Array, Array]:
        """Weights, what each query's are to be divided by, and the logarithm to be taken from its scores instead, which
        is infinite if it sees nothing."""
        scores = self.scores(bias)
        highest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(-1, keepdims=True)
        return weights, total, jnp.where(highest > NOTHING, highest + jnp.log(total), jnp.inf)

    def cut(self, x: Array) -> Array:
        """The block's part of what there is for every query."""
        return jax.lax.dynamic_slice_in_dim(x, self.first, self.options.block, 3)

    def backward(
        self, bias: Array | None, log_total: Array, delta: Array, gradient: Array
    ) -> tuple[Array, Array, Array, Callable]:
        """The block's weights, its part of ``gradient``, the gradient of its scores, and from that to the bias's."""
        scores, back_to_bias = jax.vjp(self.scores, bias)
        own, own_delta = self.cut(gradient), self.cut(delta)
        weights = jnp.exp(scores - log_total)
        of_weights = self.dropped(jnp.einsum("bkgqd,bksd->bkgqs", own, self.value, **FLOAT32))
        return weights, own, weights * (of_weights - own_delta), back_to_bias

    def dropped(self, weights: Array) -> Array:
        """After dropout, the same one whenever it is asked for."""
        if self.words is None:
            return weights
        queries, keys = self.places()
        index = queries[:, None] * self.keys + keys
        return weights * stream_factors(self.words[..., 0], self.words[..., 1], index, self.options.dropout_rate)

    def places(self) -> tuple[Array, Array]:
        """Where the queries and keys stand in the row."""
        return self.first + jnp.arange(self.query.shape[3]), self.first_key + jnp.arange(self.key.shape[2])

    def added(self, total: Array, part: Array) -> Array:
        """``total`` of all keys with ``part`` added at the block's own."""
        if part.shape == total.shape:
            return total + part
        here = jax.lax.dynamic_slice_in_dim(total, self.first_key, part.shape[2], 2)
        return jax.lax.dynamic_update_slice_in_dim(total, here + part, self.first_key, 2)


def _over_blocks(options: _Options, one: Callable, carry: PyTree) -> tuple[PyTree, tuple[Array, ...]]:
    """``one`` for every block, and what it gave for the queries put together along their axis, the fourth."""
    parts = []
    for band in options.bands:
        if band.blocks == 1:
            carry, given = one(carry, band.first, band)
        else:
            starts = band.first + options.block * jnp.arange(band.blocks)
            carry, given = jax.lax.scan(functools.partial(one, band=band), carry, starts)
            given = tuple(map(_joined, given))
        parts.append(given)
    return carry, tuple(jnp.concatenate(arrays, 3) for arrays in zip(*parts, strict=True))


def _joined(blocks: Array) -> Array:
    """[blocks, batch, kv_heads, group, block, …] as [batch, kv_heads, group, query, …]."""
    moved = jnp.moveaxis(blocks, 0, 3)
    return moved.reshape(*moved.shape[:3], -1, *moved.shape[5:])
