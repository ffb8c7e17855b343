"""What devices can do, by their makers' data sheets: the one table that speed and plans are measured against.

Sources: Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)"; NVIDIA's data sheets of
A100 80GB SXM, H100 SXM, H200 SXM and HGX B200, without sparsity. A TPU's memory is what XLA leaves to programs, as its
out-of-memory errors state it; a GPU's is the data sheet's.
"""

import dataclasses

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device as JAX sees it.

    Attributes:
      name: as in ``lmx plan --devices NAME:…``.
      kinds: parts of JAX's ``device_kind`` that tell it.
      peak_flops: dense bfloat16 FLOP/s.
      memory: bytes of device memory.
      memory_bandwidth: bytes a second to and from it.
      link_bandwidth: bytes a second that a device sends to its neighbours in one direction of one dimension of the
        torus (TPU), or to all others of its node (GPU).
      network_bandwidth: bytes a second that a device sends beyond its torus or node.
      node: devices that share the fast links; 0: all of a topology (TPU).
      per_chip: devices of a chip.
    """

    name: str
    kinds: tuple[str, ...]
    peak_flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    node: int = 0
    per_chip: int = 1

    @property
    def is_tpu(self) -> bool:
        """Whether the fast links form a torus."""
        return self.node == 0


HARDWARE = (
    Hardware("v4", ("TPU v4",), 275e12, 30.75 * GIB, 1228e9, 50e9, 6.25e9),
    Hardware("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 819e9, 50e9, 3.1e9),
    Hardware("v5p", ("TPU v5",), 459e12, 95.74 * GIB, 2765e9, 100e9, 6.25e9),  # the one that is not "lite"
    Hardware("v6e", ("TPU v6",), 918e12, 31.25 * GIB, 1638e9, 100e9, 12.5e9),
    Hardware("tpu7x", ("TPU7x", "TPU v7"), 1153.5e12, 94.75 * GIB, 3690e9, 100e9, 12.5e9, per_chip=2),
    Hardware("a100", ("A100",), 312e12, 80e9, 2039e9, 300e9, 25e9, node=8),
    Hardware("h100", ("H100",), 989.4e12, 80e9, 3352e9, 450e9, 50e9, node=8),
    Hardware("h200", ("H200",), 989.4e12, 141e9, 4800e9, 450e9, 50e9, node=8),
    Hardware("b200", ("B200",), 2250e12, 180e9, 7700e9, 900e9, 50e9, node=8),
)


def hardware_of(device: jax.Device) -> Hardware | None:
    """The entry for a device; None for a kind that is not known, and any CPU."""
    return next((one for one in HARDWARE if any(kind in device.device_kind for kind in one.kinds)), None)
