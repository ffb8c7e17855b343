"""From logical axis names to places on the mesh. The names are the model's; the mesh axes are the config's."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.parallel.mesh import BATCH_AXES

# Earlier rules win: an activation [batch, length, embed] has its batch split over fsdp, so its embed stays whole,
# while a kernel [embed, mlp] has no batch and is split over fsdp by embed.
RULES: tuple[tuple[str, tuple[str, ...] | str | None], ...] = (
    ("batch", BATCH_AXES),
    ("length", None),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("experts", None),
    ("capacity", None),
    ("head_dim", None),
    ("layers", None),
)


def fit_spec(spec: P, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> P:
    """``spec`` without the mesh axes that do not divide their dimension: those dimensions stay whole."""
    fitted = []
    for size, axes in zip(shape, (*spec, *[None] * (len(shape) - len(spec))), strict=True):
        axes = (axes,) if isinstance(axes, str) else axes
        fitted.append(axes if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None)
    return P(*fitted)


def param_shardings(boxed: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shardings for a tree of parameters (or their shapes) that are boxed with logical axis names.

    Returns:
      The unboxed tree's structure with a ``NamedSharding`` a leaf.
    """
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)
    shapes = nn.meta.unbox(boxed)
    return jax.tree.map(lambda leaf, spec: NamedSharding(mesh, fit_spec(spec, leaf.shape, mesh)), shapes, specs)


def like_params(tree: Any, params: Any, shardings: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shardings for a tree that holds copies of ``params`` somewhere inside it, as an optimizer's state does.

    A leaf whose path ends in a parameter's path and that has its shape goes where the parameter goes; everything
    else (counters, factored moments) is replicated.
    """
    by_path = {
        _names(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }
    replicated = NamedSharding(mesh, P())

    def place(path, leaf):
        names = _names(path)
        for start in range(len(names)):
            shape, sharding = by_path.get(names[start:], (None, None))
            if shape is not None and shape == leaf.shape:
                return sharding
        return replicated

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows over the batch axes, everything else whole."""
    return NamedSharding(mesh, P(BATCH_AXES))


def put_batch(batch: Mapping[str, Any], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Puts this host's rows of a global batch onto its devices."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def whole_dimensions(boxed: Any, mesh: jax.sharding.Mesh) -> list[str]:
    """Parameters with a dimension that should be split but is not divisible, in words, for the header of a run."""
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)
    found = []
    for (path, leaf), spec in zip(
        jax.tree_util.tree_leaves_with_path(nn.meta.unbox(boxed)),
        jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)),
        strict=True,
    ):
        for size, axes, fitted in zip(leaf.shape, spec, fit_spec(spec, leaf.shape, mesh), strict=False):
            axes = (axes,) if isinstance(axes, str) else axes
            if axes and fitted is None and math.prod(mesh.shape[axis] for axis in axes) > 1:
                found.append(f"{'/'.join(_names(path))}: {size} is not divisible over {' x '.join(axes)}, kept whole")
    return found


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
