"""The tiles that Pallas's attention goes through: in which order, what each reads, and its scores."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from lmx.kernels.dropout import stream_factors

LANES = 128
NOTHING = -1e30  # the score of a key that may not be seen; infinity less infinity would be no number


@dataclasses.dataclass(frozen=True)
class Options:
    """What a kernel is compiled for; ``keys``: of a row, without padding."""

    tile_query: int
    tile_key: int
    window: int
    causal: bool
    segments: bool
    prefix: bool
    bias: bool
    dropout_rate: float
    keys: int
    interpret: bool

    @property
    def optional(self) -> int:
        """How many of the inputs are there that only some masks and biases need."""
        return 2 * self.segments + self.prefix + self.bias

    @property
    def ahead(self) -> bool:
        """Whether a query may see keys after it."""
        return not self.causal or self.prefix

    def keys_of(self, query: Array, start: Array, tiles: int) -> tuple[Array | int, Array | int]:
        """First and last of the tiles of keys that a tile of queries may see."""
        first, last = 0, tiles - 1
        place = start + query * self.tile_query
        if self.window:
            first = jnp.maximum(place - self.window + 1, 0) // self.tile_key
            last = jnp.minimum((place + self.tile_query + self.window - 2) // self.tile_key, last)
        if not self.ahead:
            last = jnp.minimum((place + self.tile_query - 1) // self.tile_key, last)
        return first, last

    def queries_of(self, key: Array, start: Array, tiles: int) -> tuple[Array | int, Array | int]:
        """First and last of the tiles of queries that may see a tile of keys."""
        first, last = 0, tiles - 1
        place = key * self.tile_key - start
        if self.window:
            first = jnp.maximum(place - self.window + 1, 0) // self.tile_query
            last = jnp.clip((place + self.tile_key + self.window - 2) // self.tile_query, 0, last)
        if not self.ahead:
            first = jnp.maximum(place, 0) // self.tile_query
        return first, last


@dataclasses.dataclass(frozen=True)
class Grid:
    """The order in which tiles are computed, and which part of each array a tile reads or writes.

    Attributes:
      sizes: of the grid, the last running fastest.
      tiles: of queries and of keys.
      groups: heads that read one head of keys.
      place: from a grid index to (row, head, tile of queries, tile of keys).
      parallel: how many of the grid's axes may be computed in any order.
      queries_last: whether the last axis goes through queries, not keys. Sizes do not tell: they may be the same.
    """

    options: Options
    sizes: tuple[int, ...]
    tiles: tuple[int, int]
    groups: int
    place: Callable[..., tuple[Any, Any, Any, Any]]
    parallel: int
    queries_last: bool = False

    @classmethod
    def by_query(cls, options: Options, query: Array, key: Array) -> "Grid":
        """For each tile of queries all keys; with a bias, heads outermost, as its gradient sums over rows."""
        tiles = query.shape[2] // options.tile_query, key.shape[2] // options.tile_key
        batch, heads = query.shape[:2]
        groups = heads // key.shape[1]
        if options.bias:
            return cls(options, (heads, batch, *tiles), tiles, groups, lambda head, row, q, k: (row, head, q, k), 1)
        return cls(options, (batch, heads, *tiles), tiles, groups, lambda row, head, q, k: (row, head, q, k), 3)

    @classmethod
    def by_key(cls, options: Options, query: Array, key: Array) -> "Grid":
        """For each tile of keys all queries of all heads that read them."""
        tiles = query.shape[2] // options.tile_query, key.shape[2] // options.tile_key
        groups = query.shape[1] // key.shape[1]

        def place(row, kv_head, k, turn):
            return row, kv_head * groups + turn // tiles[0], turn % tiles[0], k

        return cls(options, (*key.shape[:2], tiles[1], groups * tiles[0]), tiles, groups, place, 3, queries_last=True)

    def nearest(self, place: tuple, start: Array) -> tuple:
        """``place``, or the nearest that is needed: what the last one read is not fetched again."""
        row, head, q, k = place
        if self.queries_last:
            return row, head, jnp.clip(q, *self.options.queries_of(k, start, self.tiles[0])), k
        return row, head, q, jnp.clip(k, *self.options.keys_of(q, start, self.tiles[1]))

    def spec(self, kind: str, shape: Sequence[int]) -> pl.BlockSpec:
        """The part of an array of this shape that a tile reads or writes."""
        tile_query, tile_key = self.options.tile_query, self.options.tile_key
        block, index = {
            "query": ((1, 1, tile_query, shape[-1]), lambda row, head, q, k: (row, head, q, 0)),
            "key": ((1, 1, tile_key, shape[-1]), lambda row, head, q, k: (row, head // self.groups, k, 0)),
            "query_row": ((1, 1, 1, tile_query), lambda row, head, q, k: (row, head, 0, q)),
            "query_mask": ((1, 1, tile_query), lambda row, head, q, k: (row, 0, q)),
            "key_mask": ((1, 1, tile_key), lambda row, head, q, k: (row, 0, k)),
            "bias": ((1, 1, shape[-1]), lambda row, head, q, k: (head, 0, 0)),
        }[kind]
        return pl.BlockSpec(block, lambda *at: index(*self.nearest(self.place(*at[:4]), at[4][0])))

    def call(self, kernel: Callable, scalars, inputs, outputs, scratch) -> Sequence[Array]:
        """``kernel`` over the grid; inputs, outputs and scratch as (kind, array), (kind, (shape, dtype)) and shape."""
        semantics = ["parallel"] * self.parallel + ["arbitrary"] * (len(self.sizes) - self.parallel)
        return pl.pallas_call(
            functools.partial(kernel, self),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=self.sizes,
                in_specs=[self.spec(kind, array.shape) for kind, array in inputs],
                out_specs=[self.spec(kind, shape) for kind, (shape, _) in outputs],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            out_shape=[jax.ShapeDtypeStruct(*of) for _, of in outputs],
            compiler_params=pltpu.CompilerParams(dimension_semantics=tuple(semantics)),
            interpret=self.options.interpret,
            name=kernel.__name__.strip("_").replace("kernel", "attention"),
        )(*scalars, *(array for _, array in inputs))


class Tile:
    """The tile that a kernel is at.

    Attributes:
      step, steps: of the grid's last axis, along which a kernel sums.
      is_needed: whether any of its queries may see any of its keys.
    """

    def __init__(self, grid: Grid, start, words, *inputs):
        self.grid, self.options = grid, grid.options
        self.start, self.words = start[0], words
        self.query, self.key, self.value, *rest = inputs
        self.optional = list(rest)
        self.row, self.head, self.q, self.k = grid.place(*(pl.program_id(axis) for axis in range(4)))
        self.step, self.steps = pl.program_id(3), grid.sizes[3]
        first, last = self.options.keys_of(self.q, self.start, grid.tiles[1])
        self.is_needed = (self.k >= first) & (self.k <= last)

    def scores(self) -> Array:
        """[tile_query, tile_key], float32."""
        options, optional = self.options, list(self.optional)
        scores = dot(self.query[0, 0], self.key[0, 0], transposed=True)
        if options.bias:
            place, width = self.distances()
            first = pltpu.roll(optional.pop()[0, :, pl.ds(place, width)], width - options.tile_query + 1, 1)
            scores += _skewed(first, options.tile_query)[:, : options.tile_key]
        queries, keys = self.places()
        terms = []
        if options.causal:
            past = queries >= keys
            terms.append(past | (optional[-1][0] > 0) if options.prefix else past)
        if options.window:
            terms.append(jnp.abs(queries - keys) < options.window)
        if options.segments:
            key_segments = optional[1][0]
            terms.append((as_column(optional[0][0]) == key_segments) & (key_segments > 0))
        return jnp.where(functools.reduce(jnp.logical_and, terms), scores, NOTHING) if terms else scores

    def dropped(self, weights: Array) -> Array:
        """After dropout, the same one in every kernel."""
        if not self.options.dropout_rate:
            return weights
        queries, keys = self.places()
        words = (self.words[self.row, self.head, i] for i in range(2))
        return weights * stream_factors(*words, queries * self.options.keys + keys, self.options.dropout_rate)

    def places(self) -> tuple[Array, Array]:
        """Where the queries and the keys stand in the row, [tile_query, tile_key] both."""
        shape = self.options.tile_query, self.options.tile_key
        queries = self.start + self.q * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return queries, self.k * shape[1] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)

    def distances(self) -> tuple[Array, int]:
        """Where the tile's distances begin among all, and how many they are, with one more: a multiple of 128."""
        place = self.k * self.options.tile_key + (self.grid.tiles[0] - 1 - self.q) * self.options.tile_query
        return pl.multiple_of(place, LANES), self.options.tile_query + self.options.tile_key


def _skewed(x: Array, rows: int) -> Array:
    """[rows, columns] of [1, columns], row i rolled i places to the right: twice as many rows at a time."""
    while x.shape[0] < rows:
        x = jnp.concatenate([x, pltpu.roll(x, x.shape[0], 1)], axis=0)
    return x


def dot(a: Array, b: Array, transposed: bool = False) -> Array:
    """``a @ b`` or ``a @ b.T``, summed in float32."""
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32)


def as_column(row: Array) -> Array:
    """[n, 1] of [1, n]: by a transposition of whole registers, which every TPU has."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def as_row(column: Array) -> Array:
    """[1, n] of [n, 1]."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]
