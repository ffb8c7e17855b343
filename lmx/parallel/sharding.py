"""From logical axis names to places on the mesh. The names are the model's; the mesh axes are the config's."""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.config import Mesh
from lmx.errors import ConfigError, nearest
from lmx.parallel.hardware import Hardware, hardware_of
from lmx.parallel.mesh import AXES, BATCH_AXES, make_mesh, mesh_sizes, on_hardware

# Where each logical axis goes, if it can: of several mesh axes the first is the outermost. This is the whole of
# data parallelism, ZeRO (Rajbhandari et al. 2020), Megatron's tensor and sequence parallelism (Shoeybi et al. 2019;
# Korthikanti et al. 2022), context, expert (Lepikhin et al. 2020) and pipeline parallelism (Huang et al. 2019).
RULES: dict[str, tuple[str, ...]] = {
    # of activations
    "batch": BATCH_AXES,
    "length": ("sequence",),
    "residual_length": ("sequence", "tensor"),  # between sub-layers, where nothing mixes the tokens or needs all heads
    "key_length": (),  # every query meets every key
    "expert_batch": ("data", "fsdp"),  # of what has been sent to its expert
    "capacity": (),
    # of activations and parameters
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor", "stage"),  # it and the two like it are no stage's own, so all stages share them
    "experts": ("expert",),
    # of parameters
    "embed": ("fsdp", "sequence", "expert"),
    "positions": ("tensor", "stage"),
    "head_mlp": ("tensor", "stage"),
    "layers": ("stage",),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The devices, and where everything goes on them.

    Attributes:
      mesh: the devices, by axis.
      rules: mesh axes of each logical axis.
      stage_microbatches: parts of a batch that are under way in a pipeline of stages; none: up to four a stage.
      stage_rounds: times that each of them goes round the stages.
    """

    mesh: jax.sharding.Mesh | AbstractMesh
    rules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: RULES)
    stage_microbatches: int | None = None
    stage_rounds: int = 1

    @classmethod
    def of(cls, config: Mesh, devices: Sequence[jax.Device] | None = None) -> "Layout":
        """What ``config`` asks for, over all devices unless some are given.

        Raises:
          ConfigError: the sizes do not multiply to the number of devices, or a rule names an axis that is not there.
        """
        config = on_hardware(config, hardware_of((jax.devices() if devices is None else devices)[0]))
        return cls(make_mesh(config, devices), _rules(config), config.stage_microbatches, config.stage_rounds)

    @classmethod
    def abstract(cls, config: Mesh, hardware: Hardware, devices: int) -> "Layout":
        """The same over so many devices that are not there: to be checked, not to place anything by.

        Raises:
          ConfigError: as :meth:`of`.
        """
        config = on_hardware(config, hardware)
        sizes = tuple(mesh_sizes(config, devices).values())
        return cls(AbstractMesh(sizes, AXES), _rules(config), config.stage_microbatches, config.stage_rounds)

    def axes(self, name: str | None) -> tuple[str, ...]:
        """The mesh axes of a logical axis that have more than one device."""
        return tuple(axis for axis in self.rules[name] if self.mesh.shape[axis] > 1) if name else ()

    def devices_along(self, axes: Sequence[str]) -> int:
        """Parts that these mesh axes cut a dimension into."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def activation_axes(self, names: Sequence[str | None], shape: Sequence[int]) -> tuple[tuple[str, ...], ...]:
        """The mesh axes that split each dimension of an activation. An axis is used once; a dimension is never cut into
        more parts than it has."""
        used: set[str] = set()
        split = []
        for name, size in zip(names, shape, strict=True):
            chosen: tuple[str, ...] = ()
            for axis in self.axes(name):
                if axis not in used and self.devices_along((*chosen, axis)) <= size:
                    chosen += (axis,)
            used.update(chosen)
            split.append(chosen)
        return tuple(split)

    def param_axes(self, names: Sequence[str | None], shape: Sequence[int]) -> tuple[tuple[str, ...], ...]:
        """The mesh axes that split each dimension of a parameter, in equal parts only: an axis that does not divide
        its own dimension divides another one, the largest that it can, but not that of the stacked layers."""
        chosen: list[tuple[str, ...]] = [()] * len(shape)
        homeless = []

        def add(place: int, axis: str) -> bool:
            fits = shape[place] % self.devices_along((*chosen[place], axis)) == 0
            if fits:
                chosen[place] += (axis,)
            return fits

        for place, name in enumerate(names):
            for axis in self.axes(name):
                if all(axis not in axes for axes in chosen) and axis not in homeless and not add(place, axis):
                    homeless.append(axis)
        others = sorted((place for place, name in enumerate(names) if name != "layers"), key=lambda i: -shape[i])
        for axis in homeless:
            any(add(place, axis) for place in others)
        return tuple(chosen)


def as_spec(axes: Sequence[tuple[str, ...]]) -> P:
    """The mesh axes of each dimension as JAX wants them."""
    return P(*(split or None for split in axes))


_CURRENT: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


def current_layout() -> Layout | None:
    """The layout that is being traced for; none: one device, or code that a strategy maps over devices itself."""
    return _CURRENT.get()


def current_platform() -> str:
    """What is being compiled for: cpu, gpu or tpu, there or not."""
    layout = current_layout()
    if layout is None or isinstance(layout.mesh, AbstractMesh):
        return jax.default_backend()
    device = layout.mesh.devices.flat[0]
    platform = getattr(device, "stands_for", device.platform)  # a device that a plan describes without a compiler
    return "gpu" if platform in ("cuda", "rocm") else platform


@contextlib.contextmanager
def use_layout(layout: Layout) -> Iterator[None]:
    """Within, logical axes mean axes of this layout's mesh."""
    token = _CURRENT.set(layout)
    try:
        # set_mesh, not `with mesh`: under the latter sharding constraints are dropped without a word.
        with jax.set_mesh(layout.mesh):
            yield
    finally:
        _CURRENT.reset(token)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """``x``, with its dimensions split as the current layout has it for their logical names; none: kept whole.

    A dimension that cannot be split evenly is padded within and cut again: the compiler then splits it unevenly,
    and neither the values nor the shape change.
    """
    layout = current_layout()
    if layout is None or layout.mesh.size == 1:
        return x
    split = layout.activation_axes(names, x.shape)
    spec = as_spec(split)
    missing = [-size % layout.devices_along(axes) for size, axes in zip(x.shape, split, strict=True)]
    if not any(missing):
        return jax.lax.with_sharding_constraint(x, spec)
    padded = jax.lax.with_sharding_constraint(jnp.pad(x, [(0, more) for more in missing]), spec)
    return padded[tuple(slice(size) for size in x.shape)]


def on_each_device(function: Callable, layout: Layout, in_specs: Any, out_specs: Any) -> Callable:
    """``function`` of the parts that each device has of arrays that lie by these specs, also within a stage of a
    pipeline: there the axis of stages is not to be named."""
    here = jax.sharding.get_abstract_mesh()
    manual = {name for name, kind in zip(here.axis_names, here.axis_types, strict=True) if kind == AxisType.Manual}
    axes = set(layout.mesh.axis_names) - manual
    return jax.shard_map(function, axis_names=axes, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def on_each_devices_rows(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """``function(*arrays)``, whose rows [batch, …] do not depend on each other: every device computes its own."""
    layout = current_layout()
    if layout is None or layout.mesh.size == 1:
        return function(*arrays)
    rows = arrays[0].shape[0]
    ((*axes,),) = layout.activation_axes(("batch",), (rows,))
    if rows % layout.devices_along(axes):
        axes = []
    return on_each_device(function, layout, as_spec((tuple(axes),)), as_spec((tuple(axes),)))(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(x: jax.Array, whole: tuple[str | None, ...], split: tuple[str | None, ...]) -> jax.Array:
    """A parameter as a layer uses it, with its dimensions split as ``whole`` names them.

    Its gradient is split as ``split`` names them, as soon as it is there: without that it would be kept like the
    parameter that was used, whole on every device, until the optimizer asks for it.
    """
    return constrain(x, *whole)


gathered.defvjp(
    lambda x, whole, split: (constrain(x, *whole), None),
    lambda whole, split, _, gradient: (constrain(gradient, *split),),
)


def param_shardings(boxed: Any, layout: Layout) -> Any:
    """Shardings for a tree of parameters (or their shapes) that are boxed with logical axis names.

    Returns:
      The unboxed tree's structure with a ``NamedSharding`` a leaf.
    """

    def place(leaf: Any, names: P) -> NamedSharding:
        return NamedSharding(layout.mesh, as_spec(layout.param_axes(all_names(names, leaf), leaf.shape)))

    return jax.tree.map(place, nn.meta.unbox(boxed), nn.get_partition_spec(boxed))


def like_params(tree: Any, params: Any, shardings: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shardings for a tree that holds copies of ``params`` somewhere inside it, as an optimizer's state does.

    A leaf goes where a parameter goes whose path ends its own, or stands within it, and whose shape it has; if it
    lacks one dimension of it (Adafactor's factored moments), where the others go. Everything else is replicated.
    """
    by_path = {
        _names(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }
    lengths = sorted({len(names) for names in by_path}, reverse=True)

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = _names(path)
        for length in lengths:
            for start in range(len(names) - length, -1, -1):
                found = by_path.get(names[start : start + length])
                if found is not None and found[0] == leaf.shape:
                    return found[1]
                if found is not None and len(leaf.shape) == len(found[0]) - 1:
                    return NamedSharding(mesh, _without_one(leaf.shape, *found))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(place, tree)


def on_host(sharding: NamedSharding) -> NamedSharding:
    """The same places in the memory of the devices' hosts."""
    return sharding.with_memory_kind("pinned_host")


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows over the batch axes, everything else whole."""
    return NamedSharding(mesh, P(BATCH_AXES))


def put_batch(batch: Mapping[str, Any], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Puts this host's rows of a global batch onto its devices."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def moved_dimensions(boxed: Any, layout: Layout) -> list[str]:
    """Parameters with a dimension that cannot be split as it should, in words, for the header of a run."""
    found = []
    specs = jax.tree.leaves(nn.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, P))
    for (path, leaf), names in zip(jax.tree.leaves_with_path(nn.meta.unbox(boxed)), specs, strict=True):
        names = all_names(names, leaf)
        split = layout.param_axes(names, leaf.shape)
        where = {axis: name for name, axes in zip(names, split, strict=True) for axis in axes}
        for name, size in zip(names, leaf.shape, strict=True):
            for axis in layout.axes(name):
                if where.get(axis) != name and size % layout.mesh.shape[axis]:
                    instead = f"split by {where[axis]}" if axis in where else "kept whole"
                    found.append(
                        f"{'/'.join(_names(path))}: {name} ({size}) does not divide over {axis} "
                        f"({layout.mesh.shape[axis]}), {instead}"
                    )
    return found


def _rules(config: Mesh) -> dict[str, tuple[str, ...]]:
    return RULES | dict(map(_parse_rule, config.rules))


def _parse_rule(rule: str) -> tuple[str, tuple[str, ...]]:
    """``"embed=fsdp,expert"`` as a name and its axes."""
    name, equals, axes = rule.partition("=")
    name, places = name.strip(), tuple(axis.strip() for axis in axes.split(",") if axis.strip())
    if not equals or name not in RULES:
        raise ConfigError(
            f"mesh.rules: {rule!r} is not LOGICAL_AXIS=MESH_AXIS,…{nearest(name, list(RULES))}; logical axes are "
            f"{', '.join(RULES)}."
        )
    if name == "batch" and places != BATCH_AXES:
        raise ConfigError(f"mesh.rules: the batch is always split over {', '.join(BATCH_AXES)}; change their sizes.")
    for axis in places:
        if axis not in AXES:
            raise ConfigError(
                f"mesh.rules: {rule!r} names {axis!r}, which is no axis of the mesh{nearest(axis, AXES)}; they are "
                f"{', '.join(AXES)}."
            )
    return name, places


def all_names(names: P, leaf: Any) -> tuple[str | None, ...]:
    """A name or none for every dimension; a leaf without names has none at all."""
    return (*names, *[None] * (len(leaf.shape) - len(names)))


def _without_one(shape: tuple[int, ...], whole: tuple[int, ...], sharding: NamedSharding) -> P:
    """The spec of an array that has all dimensions of ``whole`` but one."""
    spec = (*sharding.spec, *[None] * (len(whole) - len(sharding.spec)))
    for gone in range(len(whole) - 1, -1, -1):
        if whole[:gone] + whole[gone + 1 :] == shape:
            return P(*spec[:gone], *spec[gone + 1 :])
    return P()


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
