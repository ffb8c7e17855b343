"""Attention as one kernel, for TPUs: weights are there a tile at a time and never leave the core.

FlashAttention-2 (Dao 2023, algorithms 1 and 2), with what lmx masks by (segments, order, windows, prefixes), grouped
heads and T5's bias by distance worked into each tile. Tiles that the order or the window forbids are skipped, and
not fetched. Written in Pallas; on a CPU it is interpreted, which is for tests.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Key

from lmx.kernels.attention.mask import Mask
from lmx.kernels.attention.pallas_tiles import LANES, NOTHING, Grid, Options, Tile, as_column, as_row, dot
from lmx.kernels.dropout import stream_words
from lmx.kernels.products import flat
from lmx.parallel.sharding import Layout, as_spec, current_layout, current_platform, on_each_device

TILE = 512  # queries and keys of a tile: a megabyte of scores


def pallas_attention(
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
    tile: int = TILE,
) -> Float[Array, "batch query heads head_dim"]:
    """Attention of whole rows; see :func:`lmx.kernels.attention.attention`.

    Each device computes its own rows, heads and queries, with all keys.

    Args:
      tile: queries and keys of a tile, at most: 128 times a power of two.
    """
    options = Options(
        tile,
        tile,
        window,
        mask.causal,
        segments=not mask.whole,
        prefix=mask.prefix is not None,
        bias=bias is not None,
        dropout_rate=dropout_rate,
        keys=key.shape[1],
        interpret=current_platform() == "cpu",
    )
    query = query * jnp.asarray(scale, query.dtype)
    words = stream_words(dropout_rng, (query.shape[0], query.shape[2])) if dropout_rate else None
    arguments = (query, key, value, mask.rows(), bias, words)
    layout = current_layout()
    if layout is None or layout.mesh.size == 1:
        return _on_device(options, *arguments, start=0)
    return _on_mesh(options, layout, *arguments)


def _on_mesh(options: Options, layout: Layout, query, key, value, rows, bias, words):
    """Every device computes its part of the batch, the queries and the heads."""
    batch, length, heads, _ = layout.activation_axes(("batch", "length", "heads", "head_dim"), query.shape)
    if layout.activation_axes(("kv_heads",), key.shape[2:3]) != (heads,):
        groups = query.shape[2] // key.shape[2]  # fewer than devices: each has those that its own heads read
        key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    row_specs = {name: as_spec((batch, length if name == "query_segments" else ())) for name in rows}
    queries, keys = as_spec((batch, length, heads, ())), as_spec((batch, (), heads, ()))

    def one(query, *others):
        start = jax.lax.axis_index(length) * query.shape[1] if length else 0
        return _on_device(options, query, *others, start=start)

    in_specs = (queries, keys, keys, row_specs, as_spec((heads, ())), as_spec((batch, heads, ())))
    return on_each_device(one, layout, in_specs, queries)(query, key, value, rows, bias, words)


def _on_device(options: Options, query, key, value, rows, bias, words, *, start):
    """Attention on one device, whose first query stands at ``start``."""
    queries, keys = query.shape[1], key.shape[1]
    tile_query, tile_key = _tile_of(queries, options.tile_query), _tile_of(keys, options.tile_key)
    more = {"query": -queries % tile_query, "key": -keys % tile_key}
    options = dataclasses.replace(
        options, tile_query=tile_query, tile_key=tile_key, segments=options.segments or any(more.values())
    )

    def heads_first(x: Array, more: int) -> Array:
        return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, more), (0, 0)))

    def padded(name: str, row: Array) -> Array:
        return jnp.pad(row.astype(jnp.int32), ((0, 0), (0, more["query" if name == "query_segments" else "key"])))

    rows = {name: padded(name, row)[:, None] for name, row in rows.items() if options.segments or name == "prefix"}
    if bias is not None:  # of as many distances as padded queries and keys have, and one more
        bias = jnp.pad(bias.astype(jnp.float32), ((0, 0), (more["query"], more["key"] + 1)))[:, None]
    scalars = jnp.full(1, start, jnp.int32), jnp.zeros((1, 1, 2), jnp.int32) if words is None else words
    query, key, value = (
        heads_first(query, more["query"]),
        heads_first(key, more["key"]),
        heads_first(value, more["key"]),
    )
    return _attention(options, query, key, value, bias, rows, scalars)[:, :, :queries].transpose(0, 2, 1, 3)


def _tile_of(size: int, most: int) -> int:
    """The tile for so many queries or keys: of 128, 256, … up to ``most`` the largest that pads them least."""
    tiles = [most >> i for i in range(most.bit_length()) if (most >> i) % LANES == 0]
    return min(tiles, key=lambda tile: (-(-size // tile) * tile, -tile))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: Options, query, key, value, bias, rows, scalars):
    """Query, scaled, [batch, heads, query, head_dim]; key and value [batch, kv_heads, key, head_dim]; bias [heads, 1,
    distances + 1]; ``rows``: what the mask is made of, [batch, 1, query or key] each; ``scalars``: the place of the
    first query, [1], and the words of dropout, [batch, heads, 2]."""
    return _forward(options, query, key, value, bias, rows, scalars)[0]


def _forward(options: Options, query, key, value, bias, rows, scalars):
    totals = (*query.shape[:2], 1, query.shape[2])
    output, log_total = Grid.by_query(options, query, key).call(
        _forward_kernel,
        scalars,
        [("query", query), ("key", key), ("key", value), *_optional(bias, rows)],
        [("query", (query.shape, query.dtype)), ("query_row", (totals, jnp.float32))],
        [(options.tile_query, 1), (options.tile_query, 1), (options.tile_query, query.shape[3])],
    )
    return output, (*map(_flat, (query, key, value, output)), bias, rows, scalars, log_total)


def _backward(options: Options, residuals, gradient):
    *kept, bias, rows, scalars, log_total = residuals
    query, key, value, output = (_heads_first(x, gradient.shape[3]) for x in kept)
    delta = (gradient.astype(jnp.float32) * output.astype(jnp.float32)).sum(-1)[:, :, None]
    inputs = [("query", query), ("key", key), ("key", value), ("query", gradient)]
    inputs += [("query_row", log_total), ("query_row", delta), *_optional(bias, rows)]
    outputs = [("query", (query.shape, query.dtype))]
    if bias is not None:
        outputs.append(("bias", (bias.shape, jnp.float32)))
    of_query, *of_bias = Grid.by_query(options, query, key).call(
        _query_kernel, scalars, inputs, outputs, [(options.tile_query, query.shape[3])]
    )
    outputs = [("key", (key.shape, key.dtype)), ("key", (value.shape, value.dtype))]
    of_key, of_value = Grid.by_key(options, query, key).call(
        _key_kernel, scalars, inputs, outputs, 2 * [(options.tile_key, key.shape[3])]
    )
    return of_query, of_key, of_value, of_bias[0] if of_bias else None, None, None


_attention.defvjp(_forward, _backward)


def _flat(x: Array) -> Array:
    """Queries, keys, values or outputs as backward is to find them: as projections make and take them, and not twice as
    large, as heads of 64 are when they lie apart (see :func:`lmx.kernels.products.flat`)."""
    return flat(x.transpose(0, 2, 1, 3), 2)


def _heads_first(x: Array, head_dim: int) -> Array:
    return x.reshape(*x.shape[:2], -1, head_dim).transpose(0, 2, 1, 3)


def _optional(bias: Array | None, rows: dict[str, Array]) -> list[tuple[str, Array]]:
    """What a kernel reads where it is there, in a fixed order."""
    kinds = {"query_segments": "query_mask", "key_segments": "key_mask", "prefix": "key_mask"}
    found = [(kind, rows[name]) for name, kind in kinds.items() if name in rows]
    return found + ([("bias", bias)] if bias is not None else [])


def _forward_kernel(grid: Grid, start, words, *refs):
    *inputs, output, log_total, highest, total, summed = refs
    tile = Tile(grid, start, words, *inputs)

    @pl.when(tile.step == 0)
    def _():
        highest[...] = jnp.full_like(highest, NOTHING)
        total[...] = jnp.zeros_like(total)
        summed[...] = jnp.zeros_like(summed)

    @pl.when(tile.is_needed)
    def _():
        scores = tile.scores()
        new = jnp.maximum(highest[...], scores.max(1, keepdims=True))
        shrunk = jnp.exp(highest[...] - new)
        weights = jnp.exp(scores - new)
        total[...] = shrunk * total[...] + weights.sum(1, keepdims=True)
        weights = tile.dropped(weights).astype(tile.value.dtype)
        summed[...] = shrunk * summed[...] + dot(weights, tile.value[0, 0])
        highest[...] = new

    @pl.when(tile.step == tile.steps - 1)
    def _():
        seen = highest[...] > NOTHING
        output[0, 0] = jnp.where(seen, summed[...] / jnp.where(seen, total[...], 1), 0).astype(output.dtype)
        log_total[0, 0] = as_row(jnp.where(seen, highest[...] + jnp.log(jnp.where(seen, total[...], 1)), -NOTHING))


def _query_kernel(grid: Grid, start, words, query, key, value, gradient, log_total, delta, *rest):
    optional, (of_query, *of_bias, summed) = rest[: grid.options.optional], rest[grid.options.optional :]
    tile = Tile(grid, start, words, query, key, value, *optional)

    @pl.when(tile.step == 0)
    def _():
        summed[...] = jnp.zeros_like(summed)

    if of_bias:

        @pl.when((tile.row == 0) & (tile.q == 0) & (tile.k == 0))
        def _():
            of_bias[0][...] = jnp.zeros_like(of_bias[0])

    @pl.when(tile.is_needed)
    def _():
        _, of_scores = _gradients(tile, gradient, log_total, delta)
        summed[...] += dot(of_scores.astype(key.dtype), key[0, 0])
        if of_bias:
            place, width = tile.distances()
            wide = jnp.concatenate([of_scores, jnp.zeros((of_scores.shape[0], width - of_scores.shape[1]))], 1)
            of_bias[0][0, :, pl.ds(place, width)] += pltpu.roll(_skewed_sum(wide), of_scores.shape[0] - 1, 1)

    @pl.when(tile.step == tile.steps - 1)
    def _():
        of_query[0, 0] = summed[...].astype(of_query.dtype)


def _key_kernel(grid: Grid, start, words, query, key, value, gradient, log_total, delta, *rest):
    *optional, of_key, of_value, key_sum, value_sum = rest
    tile = Tile(grid, start, words, query, key, value, *optional)

    @pl.when(tile.step == 0)
    def _():
        key_sum[...] = jnp.zeros_like(key_sum)
        value_sum[...] = jnp.zeros_like(value_sum)

    @pl.when(tile.is_needed)
    def _():
        weights, of_scores = _gradients(tile, gradient, log_total, delta)
        value_sum[...] += dot(tile.dropped(weights).astype(gradient.dtype).T, gradient[0, 0])
        key_sum[...] += dot(of_scores.astype(query.dtype).T, query[0, 0])

    @pl.when(tile.step == tile.steps - 1)
    def _():
        of_key[0, 0] = key_sum[...].astype(of_key.dtype)
        of_value[0, 0] = value_sum[...].astype(of_value.dtype)


def _gradients(tile: Tile, gradient, log_total, delta) -> tuple[Array, Array]:
    """The weights of a tile, computed again, and the gradient by its scores."""
    weights = jnp.exp(tile.scores() - as_column(log_total[0, 0]))
    of_weights = tile.dropped(dot(gradient[0, 0], tile.value[0, 0], transposed=True))
    return weights, weights * (of_weights - as_column(delta[0, 0]))


def _skewed_sum(x: Array) -> Array:
    """The sum over rows, [1, columns], row i rolled i places to the left: half of them at a time."""
    rows, columns = x.shape
    while rows > 1:
        rows //= 2
        x = x[:rows] + pltpu.roll(x[rows:], columns - rows, 1)
    return x
