"""Compile strategies: the same pure step by jit on one device, by pmap, or by jit with shardings over the mesh."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from lmx.errors import ConfigError
from lmx.parallel.sharding import Layout, batch_sharding, use_layout

PMAP_AXIS = "devices"
# Programs for several CPU devices that XLA reads back from a cache may begin with another collective on each device,
# and then all wait for ever. Freshly compiled they keep the order; from this version of JAX on, read back too.
READS_IN_ORDER = (0, 12)


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


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A step as it is compiled: call it with the state and a global batch, or lower it for shapes of them.

    Attributes:
      function: what ``jax.jit`` or ``jax.pmap`` made of it.
      mesh: the devices.
      layout: that it is traced for; none under pmap, where each device sees its own rows alone.
      parts: of the batch that pmap wants one for each device; 0 otherwise.
    """

    function: Any
    mesh: jax.sharding.Mesh
    layout: Layout | None
    parts: int = 0

    def __call__(self, state: Any, batch: Mapping[str, jax.Array]) -> Any:
        with self._traced(), self._cached():
            return self.function(state, self._split(batch))

    def lower(self, state: Any, batch: Mapping[str, Any]) -> Any:
        """The step lowered for arrays like these, or ``jax.ShapeDtypeStruct``."""
        with self._traced():
            return self.function.lower(state, self._split(batch))

    def _cached(self) -> contextlib.AbstractContextManager:
        on_cpus = self.mesh.size > 1 and self.mesh.devices.flat[0].platform == "cpu"
        return _uncached() if on_cpus and jax.__version_info__ < READS_IN_ORDER else contextlib.nullcontext()

    def _traced(self) -> contextlib.AbstractContextManager:
        return use_layout(self.layout) if self.layout else contextlib.nullcontext()

    def _split(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name: self._rows(x) for name, x in batch.items()} if self.parts else batch

    def _rows(self, x: Any) -> Any:
        shape = (self.parts, x.shape[0] // self.parts, *x.shape[1:])
        return x.reshape(shape) if hasattr(x, "reshape") else jax.ShapeDtypeStruct(shape, x.dtype)


def compile_step(step: Callable, strategy: str, layout: Layout, shardings: Any, *, updates: bool) -> CompiledStep:
    """Compiles ``step(state, batch)``.

    Args:
      step: returns ``(state, metrics)`` if it updates the state, else ``metrics``.
      strategy: jit, pmap or pjit.
      layout: the devices, and what goes where.
      shardings: where each leaf of the state lies.
      updates: whether a new state comes back; the old one's memory is then reused for it (not by pmap, which gives
        every device a copy of one state).

    Returns:
      A function of the state and of a global batch that lies on the mesh (:func:`lmx.parallel.sharding.put_batch`).
    """
    mesh = layout.mesh
    if strategy == "pmap":
        # The state is one replicated array a leaf; pmap splits the batch's rows and sums over its axis.
        mapped = jax.pmap(
            step,
            axis_name=PMAP_AXIS,
            in_axes=(None, 0),
            out_axes=(None, None) if updates else None,
            devices=list(mesh.devices.flat),
        )
        return CompiledStep(mapped, mesh, None, mesh.size)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    compiled = jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated) if updates else replicated,
        donate_argnums=(0,) if updates else (),
    )
    return CompiledStep(compiled, mesh, layout)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Without JAX's cache of compiled programs, which is asked for once in a process and then remembered."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
