"""A stack of layers, scanned or unrolled, and the function that takes parameters from one form to the other.

Layers that differ in kind (attention windows, sparse layers) repeat with a period. One step of the scan holds
one period, so a stack of any pattern compiles once per kind of layer.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmx.model_config import Model, is_sparse, layer_period
from lmx.models.block import Block, Context
from lmx.models.layers import PRODUCT, Dropout, Norm
from lmx.models.positions import RelativeBias
from lmx.parallel.pipeline import pipelined
from lmx.parallel.sharding import current_layout, current_platform

MOST_UNROLLED = 16  # turns of the loop over layers; compiling takes longer with each

_POLICIES = jax.checkpoint_policies
_PRODUCTS = _POLICIES.save_only_these_names(PRODUCT)  # whose gradients are rules of their own, which hide their dots
REMAT_POLICIES: dict[str, Callable | None] = {
    "full": None,
    "dots": _POLICIES.save_from_both_policies(_POLICIES.checkpoint_dots, _PRODUCTS),
    "dots_no_batch": _POLICIES.save_from_both_policies(_POLICIES.checkpoint_dots_with_no_batch_dims, _PRODUCTS),
}


def _block(config: Model, index: int, cross: bool, name: str, remat: bool = False) -> Block:
    """The layer that stands at ``index``, counted from 0."""
    windows = config.attention_windows
    cls = nn.remat(Block, policy=REMAT_POLICIES[config.remat], prevent_cse=True) if remat else Block
    return cls(config, windows[index % len(windows)], is_sparse(config, index, decoder=cross), cross, name=name)


class Period(nn.Module):
    """The layers of one period: the body of the scan."""

    config: Model
    cross: bool

    @nn.compact
    def __call__(self, x, context):
        for index in range(layer_period(self.config, decoder=self.cross)):
            x = _block(self.config, index, self.cross, f"block_{index}")(x, context)
        return x, None


class Stack(nn.Module):
    """``num_layers`` layers and what they share: T5's bias before them, the final norm after them.

    Attributes:
      cross: layers attend to an encoder's output as well.
      causal: whether the stack sees only backwards (it decides T5's buckets; the mask comes with the context).
    """

    config: Model
    num_layers: int
    cross: bool = False
    causal: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch length embed"], context: Context) -> Float[Array, "batch length embed"]:
        config = self.config
        if config.position == "relative":
            bias = RelativeBias(config, bidirectional=not self.causal, name="relative_bias")
            context = context.replace(bias=bias(context.mask.distances()))
        self.sow("intermediates", "embeddings", x)
        layout = current_layout()
        if layout is not None and layout.mesh.shape["stage"] > 1 and self._may_be_pipelined(context):
            x = self._pipelined(x, context, layout)
        else:
            x = self._scanned(x, context) if config.scan_layers else self._unrolled(x, context)
        if config.norm_position == "pre" and config.final_norm:
            x = Norm(config, name="final_norm")(x)
        x = Dropout(config.final_dropout)(x, context.train)
        self.sow("intermediates", "output", x)
        return x

    def _scanned(self, x, context):
        config = self.config
        body = Period
        if config.remat != "none":
            body = nn.remat(Period, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
        length = self.num_layers // layer_period(config, decoder=self.cross)
        layers = nn.scan(
            body,
            variable_axes={"params": 0, "cache": 0, "intermediates": 0, "experts": 0, "quantized": 0},
            split_rngs={"params": True, "dropout": True, "jitter": True},
            in_axes=nn.broadcast,
            length=length,
            unroll=length if self._is_better_unrolled(length) else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return layers(config, self.cross, name="layers")(x, context)[0]

    def _is_better_unrolled(self, length):
        """Whether the loop over layers is to be written out: on a CPU and on a GPU, loops copy what goes in and out of
        each turn.

        Not where backward computes layers again: outside of a loop the compiler finds out, and keeps them. Nor to make
        parameters, which is done once and would take longer to compile.
        """
        few = length <= MOST_UNROLLED and not self.is_initializing()
        return few and current_platform() in ("cpu", "gpu") and self.config.remat == "none"

    def _may_be_pipelined(self, context):
        """Whether nothing is asked for but the output: not when parameters are made, nor to decode or look inside."""
        asked = context.cache is not None or self.is_mutable_collection("intermediates")
        return self.config.scan_layers and not asked and not self.is_initializing()

    def _pipelined(self, x, context, layout):
        config = self.config
        period = Period(config, self.cross, parent=None)
        rows, shared, join = _by_row(context)
        keys = {name: self.make_rng(name) for name in ("dropout", "jitter") if self.has_rng(name)}

        def layer(params, x, rows, shared, index, microbatch):
            context, keys = shared
            rngs = {n: jax.random.fold_in(jax.random.fold_in(key, index), microbatch) for n, key in keys.items()}
            (x, _), sown = period.apply({"params": params}, x, join(rows, context), rngs=rngs, mutable=["experts"])
            return x, sown.get("experts", {})

        if config.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
        params = self.get_variable("params", "layers")
        x, sown = pipelined(layer, params, x, rows, (shared, keys), layout)
        if sown and self.is_mutable_collection("experts"):
            self.put_variable("experts", "layers", sown)
        return x

    def _unrolled(self, x, context):
        for index in range(self.num_layers):
            remat = self.config.remat != "none"
            x = _block(self.config, index, self.cross, f"layers_{index}", remat)(x, context)
        return x


def _by_row(context: Context) -> tuple[list, list, Callable[[list, list], Context]]:
    """The arrays of a context that have a row a row of the batch, the others, and what puts them together again."""
    names = ("query_segments", "key_segments", "prefix", "positions", "encoded")
    paths, structure = jax.tree.flatten_with_path(context)
    by_row = [path[-1].name in names for path, _ in paths]
    rows = [leaf for (_, leaf), own in zip(paths, by_row, strict=True) if own]
    shared = [leaf for (_, leaf), own in zip(paths, by_row, strict=True) if not own]

    def join(rows: list, shared: list) -> Context:
        sources = {True: iter(rows), False: iter(shared)}
        return structure.unflatten([next(sources[own]) for own in by_row])

    return rows, shared, join


def unroll_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters (or any collection) of scanned stacks, as those of unrolled ones: ``layers/block_j[i]`` becomes
    ``layers_{i * period + j}``."""
    unrolled = {}
    for name, child in params.items():
        if name == "layers":
            period = len(child)
            groups = len(jax.tree.leaves(child)[0])
            for index in range(groups * period):
                block = child[f"block_{index % period}"]
                unrolled[f"layers_{index}"] = jax.tree.map(lambda leaf, i=index // period: leaf[i], block)
        else:
            unrolled[name] = unroll_params(child) if isinstance(child, Mapping) else child
    return unrolled


def to_layout(params: Mapping[str, Any], config: Model) -> dict[str, Any]:
    """Parameters in the layout (scanned or unrolled) that ``config.scan_layers`` asks for, whichever they are in."""
    unrolled = unroll_params(params)
    if not config.scan_layers:
        return unrolled
    return {name: stack_params(child, layer_period(config, name == "decoder")) for name, child in unrolled.items()}


def stack_params(params: Mapping[str, Any], period: int) -> dict[str, Any]:
    """The inverse of :func:`unroll_params` for a stack that repeats itself after ``period`` layers."""
    layers = {name: child for name, child in params.items() if re.fullmatch(r"layers_\d+", name)}
    stacked = {
        name: stack_params(child, period) if isinstance(child, Mapping) else child
        for name, child in params.items()
        if name not in layers
    }
    if layers:
        stacked["layers"] = {
            f"block_{j}": jax.tree.map(
                lambda *leaves: jnp.stack(leaves), *(layers[f"layers_{i}"] for i in range(j, len(layers), period))
            )
            for j in range(period)
        }
    return stacked
