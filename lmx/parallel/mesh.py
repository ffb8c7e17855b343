"""The mesh of devices, and how the global batch is split over it."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from lmx.config import Mesh, Train
from lmx.errors import ConfigError, nearest
from lmx.parallel.hardware import HARDWARE, Hardware

# Slowest network first: neighbours of the last axis are neighbours of the machine.
AXES = ("stage", "data", "fsdp", "expert", "sequence", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # expert last, so that sending tokens to their experts is one all-to-all


def make_mesh(config: Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh that ``config`` asks for, over all devices unless some are given; always with every axis.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices; it says which sizes would.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = tuple(mesh_sizes(config, len(devices)).values())
    types = (AxisType.Auto,) * len(AXES)  # Explicit axes, the default, reject Linen's sharding constraints
    try:
        return jax.make_mesh(shape, AXES, types, devices=devices)
    except NotImplementedError:  # an axis is no product of the torus's dimensions: let it have a part of one
        split = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(split, AXES, axis_types=types)


def mesh_sizes(config: Mesh, devices: int) -> dict[str, int]:
    """The size of every axis, in order, over so many devices.

    Raises:
      ConfigError: as :func:`make_mesh`.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    asked = ", ".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes[axis] != 1)
    if free and devices % fixed == 0:
        sizes[free[0]] = devices // fixed
    elif fixed != devices or free:
        divisors = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise ConfigError(
            f"the mesh ({asked or 'one device'}) needs {'a multiple of ' if free else ''}{fixed} devices, but there "
            f"are {devices}. Each axis must be one of {divisors}, and together they must multiply to "
            f"{devices}; one axis may be -1, which is what is left."
        )
    return sizes


def on_hardware(config: Mesh, hardware: Hardware | None) -> Mesh:
    """``config`` with the sizes that ``config.on`` has for this kind of device, or for any, unless sizes were given.

    Raises:
      ConfigError: an entry is not ``KIND: AXIS=SIZE, …``.
    """
    entries = dict(_parse_entry(entry) for entry in config.on)
    given = any(getattr(config, axis) != getattr(Mesh(), axis) for axis in AXES)
    sizes = entries.get(hardware.name if hardware else "any", entries.get("any"))
    return config if given or sizes is None else dataclasses.replace(config, **sizes)


def _parse_entry(entry: str) -> tuple[str, dict[str, int]]:
    """``"v5p: fsdp=-1, tensor=4"`` as a kind and the size of every axis."""
    kind, colon, sizes = entry.partition(":")
    kind, known = kind.strip(), [*(hardware.name for hardware in HARDWARE), "any"]
    if not colon or kind not in known:
        raise ConfigError(f"mesh.on: {entry!r} is not KIND: AXIS=SIZE, …{nearest(kind, known)}")
    found = {}
    for part in sizes.split(","):
        axis, equals, size = (text.strip() for text in part.partition("="))
        if axis not in AXES or not equals or not size.removeprefix("-").isdecimal() or int(size) < -1 or int(size) == 0:
            raise ConfigError(f"mesh.on: {part.strip()!r} of {entry!r} is not AXIS=SIZE{nearest(axis, AXES)}")
        found[axis] = int(size)
    free = {} if -1 in found.values() else {"data": -1}
    return kind, dict.fromkeys(AXES, 1) | free | found


def batch_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Parts that the mesh cuts a batch into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


@dataclasses.dataclass(frozen=True)
class BatchSplit:
    """How the global batch, which never changes, is computed.

    Attributes:
      global_rows: rows a step, all told.
      shards: parts that the mesh's batch axes cut a micro-batch into.
      microbatches: parts computed one after the other, their gradients summed.
    """

    global_rows: int
    shards: int
    microbatches: int

    @property
    def rows_per_device(self) -> int:
        """Rows that a device computes at once."""
        return self.global_rows // (self.shards * self.microbatches)

    def __str__(self) -> str:
        return (
            f"global batch {self.global_rows} = {self.shards} batch shard(s) x {self.microbatches} micro-batch(es) x "
            f"{self.rows_per_device} row(s)"
        )


def split_batch(train: Train, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> BatchSplit:
    """Derives the split from the mesh and ``train.max_rows_per_device``: the fewest micro-batches that fit.

    Raises:
      ConfigError: the global batch cannot be divided evenly; it names sizes that can.
    """
    rows, shards = train.global_batch_size, batch_shards(mesh)
    if rows % shards:
        near = sorted({max(1, rows // shards) * shards, -(-rows // shards) * shards})
        raise ConfigError(
            f"train.global_batch_size ({rows}) does not divide over mesh {' x '.join(BATCH_AXES)} = {shards}; the "
            f"batch is never changed silently. Use {' or '.join(map(str, near))}, or other sizes of the mesh."
        )
    per_shard = rows // shards
    limit = train.max_rows_per_device or per_shard
    microbatches = next(n for n in range(1, per_shard + 1) if per_shard % n == 0 and per_shard // n <= limit)
    return BatchSplit(rows, shards, microbatches)
