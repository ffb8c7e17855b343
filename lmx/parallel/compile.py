"""Compile strategies: the same pure step by jit on one device, by pmap, or by jit with shardings over the mesh."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from lmx.errors import ConfigError
from lmx.parallel.sharding import RULES, batch_sharding

PMAP_AXIS = "devices"


def axis_name(strategy: str) -> str | None:
    """The mapped axis that a step compiled by ``strategy`` has to sum over; none where it sees the whole batch."""
    return PMAP_AXIS if strategy == "pmap" else None


def check_strategy(strategy: str, mesh: jax.sharding.Mesh) -> None:
    """Raises :class:`ConfigError` where the strategy cannot compute on this mesh."""
    if strategy == "jit" and mesh.size > 1:
        raise ConfigError(
            f"train.strategy='jit' computes on one device, but the mesh has {mesh.size}; use 'pjit', or show JAX one "
            "device only."
        )
    if strategy == "pmap" and mesh.size != mesh.shape["data"]:
        sizes = {axis: size for axis, size in mesh.shape.items() if size > 1 and axis != "data"}
        raise ConfigError(f"train.strategy='pmap' replicates parameters; it can't do mesh {sizes}. Use 'pjit'.")


def compile_step(
    step: Callable,
    strategy: str,
    mesh: jax.sharding.Mesh,
    shardings: Any,
    *,
    updates: bool,
) -> Callable:
    """Compiles ``step(state, batch)``.

    Args:
      step: returns ``(state, metrics)`` if it updates the state, else ``metrics``.
      strategy: jit, pmap or pjit.
      mesh: the devices.
      shardings: where each leaf of the state lies.
      updates: whether a new state comes back; the old one's memory is then reused for it.

    Returns:
      A function of the state and of a global batch that lies on the mesh (:func:`lmx.parallel.sharding.put_batch`).
    """
    if strategy == "pmap":
        # The state is one replicated array a leaf; pmap splits the batch's rows and sums over its axis.
        mapped = jax.pmap(
            step,
            axis_name=PMAP_AXIS,
            in_axes=(None, 0),
            out_axes=(None, None) if updates else None,
            devices=list(mesh.devices.flat),
        )
        return functools.partial(_call_mapped, mapped, mesh.size)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    compiled = jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated) if updates else replicated,
        donate_argnums=(0,) if updates else (),
    )
    return functools.partial(call_in_mesh, compiled, mesh)


def _call_mapped(mapped, devices, state, batch):
    rows = {name: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]) for name, x in batch.items()}
    return mapped(state, rows)


def call_in_mesh(function: Callable, mesh: jax.sharding.Mesh, *args: Any) -> Any:
    """Calls (and so traces, the first time) ``function`` where the model's logical axes mean axes of ``mesh``."""
    # set_mesh, not `with mesh`: under the latter Linen drops every sharding constraint without a word.
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        return function(*args)
