"""The devices that a plan is for: of a TPU topology, of GPU nodes, or of this machine."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

from lmx.errors import ConfigError
from lmx.parallel.hardware import Hardware, hardware_of, read_devices

HERE = "here"
# What XLA's GPU compiler has to be told of a card that is not there (GpuTargetConfigProto), by compute capability: SMs,
# FP32 lanes of an SM, shared memory of an SM, of a block and L2 cache in bytes, clock in GHz. From NVIDIA's whitepapers
# and table 27 of the CUDA C++ programming guide.
CARDS = {
    "a100": ((8, 0), 108, 64, 167936, 166912, 41943040, 1.41),
    "a100-40gb": ((8, 0), 108, 64, 167936, 166912, 41943040, 1.41),
    "h100": ((9, 0), 132, 128, 233472, 232448, 52428800, 1.98),
    "h200": ((9, 0), 132, 128, 233472, 232448, 62914560, 1.98),
    "b200": ((10, 0), 148, 128, 233472, 232448, 132120576, 1.96),
}
CARD = """gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_core}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth:.0f}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  device_memory_size: {memory:.0f}
  shared_memory_per_block_optin: {shared_block}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """What a plan is for.

    Attributes:
      name: as it was asked for.
      devices: to build a mesh of; they can be compiled for, and not computed on unless they are this machine's.
      hardware: what one of them can do; none where that is not known (a CPU).
      lacks: the extra that has the compiler for them, where it is not installed; what they take is then estimated.
    """

    name: str
    devices: tuple[Any, ...]
    hardware: Hardware | None
    lacks: str = ""


@dataclasses.dataclass(frozen=True)
class AbsentDevice:
    """As much of a device as a mesh looks at, where there is no compiler to describe it.

    Attributes:
      stands_for: the platform that it would be of, which decides on kernels; to JAX it is of none.
    """

    id: int
    device_kind: str
    stands_for: str
    process_index: int = 0
    platform: str = "absent"


def open_target(name: str) -> Target:
    """The devices that ``name`` says: ``here``, ``v5p:8x8x16`` (chips along each dimension of the torus), ``h100:64``.

    Raises:
      ConfigError: there is no such kind of device, or the number or shape is not one.
    """
    if name == HERE:
        devices = tuple(jax.devices())
        return Target(name, devices, hardware_of(devices[0]))
    asked = read_devices(name, others=(HERE,))
    name, hardware = asked.name, asked.hardware
    extra, package = ("plan", "libtpu") if hardware.is_tpu else ("gpu", "jax_cuda13_plugin")
    if importlib.util.find_spec(package) is None:
        kind, platform = hardware.kinds[0], "tpu" if hardware.is_tpu else "gpu"
        absent = (AbsentDevice(i, kind, platform) for i in range(asked.count))
        return Target(name, tuple(absent), hardware, lacks=extra)
    return Target(name, tuple(_tpu_devices(name) if hardware.is_tpu else _gpu_devices(hardware, asked.chips)), hardware)


def _tpu_devices(name: str) -> list[jax.Device]:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing runs on a TPU here, so other plans may go on
    from jax.experimental import topologies

    # A v4 chip is one device on real machines; this compiler would have it as two, which no mesh is made of.
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        with quiet():
            return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--devices {name!r} is not a topology that the TPU compiler knows: {reason}") from error


def _gpu_devices(hardware: Hardware, count: int) -> list[jax.Device]:
    from jax.experimental import topologies

    (major, minor), cores, lanes, shared_core, shared_block, l2, clock = CARDS[hardware.name]
    card = CARD.format(
        major=major,
        minor=minor,
        cores=cores,
        lanes=lanes,
        shared_core=shared_core,
        shared_block=shared_block,
        l2=l2,
        clock=clock,
        bandwidth=hardware.memory_bandwidth,
        memory=hardware.memory,
        name=hardware.kinds[0],
    )
    each = min(count, hardware.node)
    with quiet():
        topology = topologies.get_topology_desc(
            hardware.name, platform="cuda", target_config=card, topology=f"1x{math.ceil(count / each)}x{each}"
        )
    return topology.devices


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what compilers write to the standard error of the process itself away from the terminal."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as noise:
        os.dup2(noise.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
