"""The mesh of devices, and how the global batch is split over it."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType

from lmx.config import Mesh, Train
from lmx.errors import ConfigError

AXES = ("data", "fsdp", "tensor", "sequence", "expert", "stage")
BATCH_AXES = ("data", "fsdp")
_SUPPORTED = ("data", "fsdp", "tensor")


def make_mesh(config: Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh that ``config`` asks for, over all devices unless some are given; always with every axis.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices; it says which sizes would.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dataclasses.asdict(config)
    for axis in AXES:
        if axis not in _SUPPORTED and sizes[axis] not in (1, -1):
            raise ConfigError(
                f"mesh.{axis}={sizes[axis]}: this version of lmx splits work over {', '.join(_SUPPORTED)} only; "
                f"set mesh.{axis}=1."
            )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    asked = ", ".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes[axis] != 1)
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices) or free:
        divisors = ", ".join(str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0)
        raise ConfigError(
            f"the mesh ({asked or 'one device'}) needs {'a multiple of ' if free else ''}{fixed} devices, but there "
            f"are {len(devices)}. Each axis must be one of {divisors}, and together they must multiply to "
            f"{len(devices)}; one axis may be -1, which is what is left."
        )
    shape = tuple(sizes[axis] for axis in AXES)
    # Explicit axes, the default, reject Linen's sharding constraints.
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def batch_shards(mesh: jax.sharding.Mesh) -> int:
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


def split_batch(train: Train, mesh: jax.sharding.Mesh) -> BatchSplit:
    """Derives the split from the mesh and ``train.max_rows_per_device``: the fewest micro-batches that fit.

    Raises:
      ConfigError: the global batch cannot be divided evenly; it names sizes that can.
    """
    rows, shards = train.global_batch_size, batch_shards(mesh)
    if rows % shards:
        near = sorted({max(1, rows // shards) * shards, -(-rows // shards) * shards})
        raise ConfigError(
            f"train.global_batch_size ({rows}) does not divide over mesh data x fsdp = {shards}; the batch is never "
            f"changed silently. Use {' or '.join(map(str, near))}, or other sizes of the mesh."
        )
    per_shard = rows // shards
    limit = train.max_rows_per_device or per_shard
    microbatches = next(n for n in range(1, per_shard + 1) if per_shard % n == 0 and per_shard // n <= limit)
    return BatchSplit(rows, shards, microbatches)
