"""What devices can do, by their makers' data sheets: the one table that speed, plans and jobs are made from.

Sources: Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)"; NVIDIA's data sheets of
A100 SXM, H100 SXM, H200 SXM and HGX B200, without sparsity. A TPU's memory is what XLA leaves to programs, as its
out-of-memory errors state it; a GPU's is the data sheet's. What GKE and SkyPilot call them: Google's page "Plan TPUs in
GKE", the tables of `xpk` and SkyPilot's catalog.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import jax

from lmx.errors import ConfigError, nearest

GIB = 2**30
HOST_CHIPS = 4  # of a TPU: 2 x 2 of its torus
# Slices of TPUs whose torus has two dimensions.
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device as JAX sees it.

    Attributes:
      name: as in ``lmx plan --devices NAME:…``.
      kinds: JAX's ``device_kind`` of it: all of it for a GPU, whose other cards of nearly that name differ in memory or
        speed; its beginning for a TPU. The first is what stands in for one that is not there.
      peak_flops: dense bfloat16 FLOP/s.
      memory: bytes of device memory.
      memory_bandwidth: bytes a second to and from it.
      link_bandwidth: bytes a second that a device sends to its neighbours in one direction of one dimension of the
        torus (TPU), or to all others of its node (GPU).
      network_bandwidth: bytes a second that a device sends beyond its torus or node.
      node: devices that share the fast links; 0: all of a topology (TPU).
    """

    name: str
    kinds: tuple[str, ...]
    peak_flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    node: int = 0

    @property
    def is_tpu(self) -> bool:
        """Whether the fast links form a torus."""
        return self.node == 0


HARDWARE = (
    Hardware("v4", ("TPU v4",), 275e12, 30.75 * GIB, 1228e9, 50e9, 6.25e9),
    Hardware("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 819e9, 50e9, 3.1e9),
    Hardware("v5p", ("TPU v5",), 459e12, 95.74 * GIB, 2765e9, 100e9, 6.25e9),  # the one that is not "lite"
    Hardware("v6e", ("TPU v6",), 918e12, 31.25 * GIB, 1638e9, 100e9, 12.5e9),
    Hardware("tpu7x", ("TPU7x", "TPU v7"), 1153.5e12, 94.75 * GIB, 3690e9, 100e9, 12.5e9),  # half a chip
    Hardware("a100", ("NVIDIA A100-SXM4-80GB",), 312e12, 80e9, 2039e9, 300e9, 25e9, node=8),
    Hardware("a100-40gb", ("NVIDIA A100-SXM4-40GB",), 312e12, 40e9, 1555e9, 300e9, 25e9, node=8),
    Hardware("h100", ("NVIDIA H100 80GB HBM3",), 989.4e12, 80e9, 3352e9, 450e9, 50e9, node=8),
    Hardware("h200", ("NVIDIA H200",), 989.4e12, 141e9, 4800e9, 450e9, 50e9, node=8),
    Hardware("b200", ("NVIDIA B200",), 2250e12, 180e9, 7700e9, 900e9, 50e9, node=8),
)


@dataclasses.dataclass(frozen=True)
class Rented:
    """A kind of device as clouds rent it out.

    Attributes:
      gke: the value of GKE's node label for it.
      skypilot: SkyPilot's name for it, of so many ``chips`` or ``cores``; empty: it has none.
      torus: dimensions that a topology is written in; 0: GPUs, by their number.
      most: chips of the largest slice.
      devices_per_chip: how many JAX sees in a chip.
    """

    gke: str
    skypilot: str
    torus: int = 0
    most: int = 0
    devices_per_chip: int = 1


RENTED = {
    "v4": Rented("tpu-v4-podslice", "tpu-v4-{cores}", torus=3, most=4096),
    "v5e": Rented("tpu-v5-lite-podslice", "tpu-v5litepod-{chips}", torus=2, most=256),
    "v5p": Rented("tpu-v5p-slice", "tpu-v5p-{cores}", torus=3, most=6144),
    "v6e": Rented("tpu-v6e-slice", "tpu-v6e-{chips}", torus=2, most=256),
    "tpu7x": Rented("tpu7x", "", torus=3, most=9216, devices_per_chip=2),
    "a100": Rented("nvidia-a100-80gb", "A100-80GB"),
    "a100-40gb": Rented("nvidia-tesla-a100", "A100"),
    "h100": Rented("nvidia-h100-80gb", "H100"),
    "h200": Rented("nvidia-h200-141gb", "H200"),
    "b200": Rented("nvidia-b200", "B200"),
}


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices of one kind, as ``KIND:SIZE`` asks for them.

    Attributes:
      name: as they were asked for.
      hardware: the kind.
      shape: chips along each dimension of the torus (TPU), or how many there are alone (GPU).
    """

    name: str
    hardware: Hardware
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Chips of a TPU topology, GPUs otherwise."""
        return math.prod(self.shape)

    @property
    def rented(self) -> Rented:
        """What clouds call them."""
        return RENTED[self.hardware.name]

    @property
    def count(self) -> int:
        """Devices as JAX counts them."""
        return self.chips * self.rented.devices_per_chip

    @property
    def chips_per_host(self) -> int:
        """Chips of one machine, as clouds rent topologies of several: four of a TPU, a node of GPUs."""
        return min(self.chips, self.hardware.node or HOST_CHIPS)

    @property
    def hosts(self) -> int:
        """Machines that they are spread over, with a process of lmx on each."""
        return -(-self.chips // self.chips_per_host)


def read_devices(name: str, others: Sequence[str] = ()) -> Devices:
    """What ``v5p:8x8x16`` (chips along each dimension of the torus) or ``h100:64`` asks for.

    Args:
      others: what else may be written where the name is asked for; errors name it too.

    Raises:
      ConfigError: there is no such kind of device, or the number or shape is not one.
    """
    kind, _, size = name.lower().partition(":")
    hardware = next((one for one in HARDWARE if one.name == kind), None)
    if hardware is None:
        *most, last = "v5p:8x8x16", "h100:8", *others
        near = "" if kind in others else nearest(kind, [*(one.name for one in HARDWARE), *others])
        raise ConfigError(f"--devices {name!r} is no kind of device{near}; write {', '.join(most)} or {last}.")
    shape = r"[1-9]\d*(x[1-9]\d*){1,2}" if hardware.is_tpu else r"[1-9]\d*"
    if not re.fullmatch(shape, size):
        example = "chips along each dimension, as in v5e:4x4 or v5p:8x8x16" if hardware.is_tpu else "as in h100:64"
        found = f"{size!r} is not" if size else "it lacks"
        raise ConfigError(f"--devices {name!r}: {found} how many devices there are: {example}.")
    if not hardware.is_tpu and (int(size) > hardware.node and int(size) % hardware.node):
        raise ConfigError(f"--devices {name!r}: {kind} comes in nodes of {hardware.node}; use a multiple of it.")
    devices = Devices(f"{kind}:{size}", hardware, tuple(map(int, size.split("x"))))
    if hardware.is_tpu:
        _check_slice(devices)
    return devices


def _check_slice(devices: Devices) -> None:
    """Raises where there are no slices of this shape: Google's pages "TPU v4", "TPU v5e" and so on list them."""
    shape, rented = devices.shape, devices.rented
    flat, kind = rented.torus == 2, devices.hardware.name
    if len(shape) != rented.torus:
        raise ConfigError(
            f"--devices {devices.name!r}: topologies of {kind} have {rented.torus} dimensions, as in "
            f"{kind}:{'4x4' if flat else '4x4x8'}."
        )
    if flat:
        offered, which = shape in FLAT, ", ".join("x".join(map(str, one)) for one in FLAT)
    else:
        cube = all(size in (2, 4) for size in shape) or all(size % 4 == 0 for size in shape)
        offered = shape in ((1, 1, 1), (2, 2, 1)) or (cube and list(shape) == sorted(shape))
        which = "2x2x1, and AxBxC with A <= B <= C that are 2 or 4, or multiples of 4"
    if not offered or devices.chips > rented.most:
        raise ConfigError(
            f"--devices {devices.name!r}: there is no such slice; {kind} comes as {which}, up to {rented.most:,} chips."
        )


def hardware_of(device: jax.Device) -> Hardware | None:
    """The entry for a device; None for a kind that is not known, and any CPU."""
    kind = device.device_kind
    return next((one for one in HARDWARE if kind in one.kinds or (one.is_tpu and kind.startswith(one.kinds))), None)
