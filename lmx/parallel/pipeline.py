"""Layers in stages, one after the other on different devices, kept busy by the parts of a batch.

The schedule is circular (Huang et al. 2019, section 2.3; Narayanan et al. 2021, section 2.2): with S stages, R rounds
and M microbatches, chunk ``r * S + s`` of the layers is stage s's in round r, and every tick each stage computes one
microbatch and hands it to the next. Of ``R * M + S - 1`` ticks a stage idles in S - 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree

from lmx.errors import ConfigError
from lmx.model_config import Model, layer_period
from lmx.parallel.sharding import Layout, constrain

AXIS = "stage"
MICROBATCHES_A_STAGE = 4  # of more, each smaller, what is gained in idle time is small: 3 / 19 at four stages

Layer = Callable[[PyTree, Array, PyTree, PyTree, Int[Array, ""], Int[Array, ""]], tuple[Array, PyTree]]


def check_pipeline(model: Model, rows: int, layout: Layout) -> None:
    """Raises :class:`ConfigError` where the stages cannot share the layers, or the rows of a device, evenly."""
    stages, rounds = layout.mesh.shape[AXIS], layout.stage_rounds
    if stages == 1:
        return
    if not model.scan_layers:
        raise ConfigError(f"mesh.stage={stages} splits stacked layers: set model.scan_layers=True.")
    two = model.architecture == "encoder_decoder"
    depths = {"num_layers": (model.num_layers, layer_period(model))}
    if two:
        decoder_layers = model.num_decoder_layers or model.num_layers
        depths["num_decoder_layers"] = (decoder_layers, layer_period(model, decoder=True))
    for name, (layers, period) in depths.items():
        groups = layers // period
        if groups % (stages * rounds):
            each = f" of {period}, the period in which layers alternate" if period > 1 else ""
            raise ConfigError(
                f"model.{name} ({layers}) makes {groups} group(s){each}, which do not divide over mesh.stage={stages} "
                f"x mesh.stage_rounds={rounds}; use stages and rounds whose product divides {groups}."
            )
    stage_microbatches(rows, layout)


def stage_microbatches(rows: int, layout: Layout) -> int:
    """Microbatches in the pipeline for a batch of so many rows on a device.

    Raises:
      ConfigError: they would be fewer than the stages, or do not divide the rows.
    """
    stages, asked = layout.mesh.shape[AXIS], layout.stage_microbatches
    divisors = [n for n in range(stages, min(rows, MICROBATCHES_A_STAGE * stages) + 1) if rows % n == 0]
    if asked is None and not divisors:
        raise ConfigError(
            f"mesh.stage={stages} needs the {rows} row(s) that each device computes at once to divide into at least "
            f"{stages} microbatches, one a stage; use a multiple of {stages} rows (train.global_batch_size, "
            "train.max_rows_per_device, eval.batch_size), or fewer stages."
        )
    if asked is not None and (asked < stages or rows % asked):
        raise ConfigError(
            f"mesh.stage_microbatches={asked} must be at least mesh.stage ({stages}) and divide the {rows} rows that "
            "each device computes at once."
        )
    return asked or divisors[-1]


def pipelined(layer: Layer, params: PyTree, x: Array, rows: PyTree, shared: PyTree, layout: Layout) -> tuple:
    """``layer`` after ``layer``, over the stages of the mesh.

    Args:
      layer: ``(params, x, rows, shared, index, microbatch) -> (x, aux)``, with the parameters of layer ``index``.
      params: of all layers, stacked: [layers, ...].
      x: what flows through them, [batch, ...].
      rows: what belongs to the rows of the batch and stays the same in every layer, [batch, ...].
      shared: what every layer reads.
      layout: the mesh, and how many microbatches and rounds there are.

    Returns:
      The last layer's ``x``, and what every layer gave beside it, [layers, batch, ...] where a layer's is [batch, ...].
    """
    stages, rounds = layout.mesh.shape[AXIS], layout.stage_rounds
    shards = layout.devices_along(layout.axes("batch"))
    microbatches = stage_microbatches(max(1, x.shape[0] // shards), layout)

    def split(array: Array) -> Array:
        """Row i goes to microbatch i % M, so that no row changes device."""
        parts = array.reshape(array.shape[0] // microbatches, microbatches, *array.shape[1:]).swapaxes(0, 1)
        return constrain(parts, None, "batch", *[None] * (array.ndim - 1))

    def chunks(leaf: Array) -> Array:
        """[rounds, stages, layers of a chunk, ...]; moves parameters between stages if there are several rounds."""
        return leaf.reshape(rounds, stages, -1, *leaf.shape[1:])

    def stage(number: Array, params: PyTree, x: Array, rows: PyTree, shared: PyTree) -> tuple[Array, PyTree]:
        params = jax.tree.map(lambda leaf: leaf[:, 0], params)
        return _stage(layer, number[0], stages, params, x, rows, shared)

    x, aux = jax.shard_map(
        stage,
        axis_names={AXIS},
        in_specs=(P(AXIS), P(None, AXIS), P(), P(), P()),
        out_specs=(P(AXIS), P(None, AXIS)),
        check_vma=False,
    )(jnp.arange(stages), jax.tree.map(chunks, params), split(x), jax.tree.map(split, rows), shared)

    def whole(leaf: Array) -> Array:
        """[rounds, stages, layers of a chunk, M, rows, ...] as [layers, batch, ...]."""
        leaf = leaf.reshape(-1, *leaf.shape[3:]).swapaxes(1, 2)
        return leaf.reshape(leaf.shape[0], -1, *leaf.shape[3:])

    x = x[0].swapaxes(0, 1)  # what has gone all the way round is with the first stage
    return x.reshape(-1, *x.shape[2:]), jax.tree.map(whole, aux)


def _stage(
    layer: Layer, number: Array, stages: int, params: PyTree, x: Array, rows: PyTree, shared: PyTree
) -> tuple[Array, PyTree]:
    """What one stage does: params [rounds, layers of a chunk, ...], x and rows [M, rows, ...]."""
    rounds, depth = jax.tree.leaves(params)[0].shape[:2]
    microbatches = x.shape[0]
    ticks = rounds * microbatches + stages - 1

    def chunk(x: Array, params: PyTree, rows: PyTree, turn: Array, microbatch: Array) -> tuple[Array, PyTree]:
        def one(x: Array, place: tuple[PyTree, Array]) -> tuple[Array, PyTree]:
            layer_params, index = place
            return layer(layer_params, x, rows, shared, index, microbatch)

        first = (turn * stages + number) * depth
        return jax.lax.scan(one, x, (params, first + jnp.arange(depth)))

    def put(waiting: Array, arrived: Array, tick: Array | int) -> Array:
        """What came back to the first stage waits in its microbatch's place for the next round, or for the end."""
        place = (tick - stages) % microbatches
        kept = jnp.where(tick >= stages, arrived, waiting[place])
        return jax.lax.dynamic_update_index_in_dim(waiting, kept, place, 0)

    def advance(carry: tuple[Array, Array], tick: Array) -> tuple[tuple[Array, Array], PyTree]:
        arrived, waiting = carry
        waiting = put(waiting, arrived, tick)
        place = tick - number  # in the order in which microbatches come to this stage; idle at either end
        microbatch, turn = place % microbatches, jnp.clip(place // microbatches, 0, rounds - 1)
        x = jnp.where(number == 0, waiting[microbatch], arrived)
        of_round = jax.tree.map(lambda leaf: leaf[turn], params)
        own_rows = jax.tree.map(lambda leaf: leaf[microbatch], rows)
        x, aux = chunk(x, of_round, own_rows, turn, microbatch)
        ring = [(stage, (stage + 1) % stages) for stage in range(stages)]
        return (jax.lax.ppermute(x, AXIS, ring), waiting), aux

    def busy(leaf: Array) -> Array:
        """Of what every tick gave, [ticks, layers, ...], that of the busy ones: [rounds, 1, layers, M, ...]."""
        leaf = jax.lax.dynamic_slice_in_dim(leaf, number, rounds * microbatches)
        return leaf.reshape(rounds, microbatches, *leaf.shape[1:]).swapaxes(1, 2)[:, None]

    (arrived, waiting), aux = jax.lax.scan(advance, (jnp.zeros_like(x[0]), x), jnp.arange(ticks))
    return put(waiting, arrived, ticks)[None], jax.tree.map(busy, aux)
