"""How a computation on a CPU gets its memory from the C library."""

import ctypes
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

ACCELERATORS = ("libtpu", "jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin")
MEMINFO, CONTROL_GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")  # proc(5); the kernel's Control Group v2
OPTIONS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}  # of glibc's mallopt (malloc.h)


def computes_on_cpu() -> bool:
    """Whether JAX will, as far as can be told without it."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return platforms == "cpu" or not (platforms or any(map(importlib.util.find_spec, ACCELERATORS)))


def keep_freed_memory() -> None:
    """Lets this process use its memory again, if it computes on a CPU; to be called before JAX is imported.

    A step's temporaries are some large blocks. The C library gives such blocks back to the system as soon as they are
    free, which then clears every page of them again for the next step. PyTorch advises its users to change the
    allocator for the same reason. Here no block is taken from outside of the heap, and nothing of the heap is given
    back. It does nothing where the C library is not glibc.
    """
    mallopt = _of_glibc("mallopt")
    if "jax" in sys.modules or not computes_on_cpu() or mallopt is None:
        return
    for option, value in OPTIONS.values():
        mallopt(option, value)


def give_freed_memory_back() -> None:
    """Returns to the system what is free now, :func:`keep_freed_memory` or not; nothing where the C library cannot."""
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def available_memory() -> int | None:
    """Bytes that this process can still have, by the machine and by its control group (a container's limit); none where
    the system does not say so (elsewhere than on Linux)."""
    machine = re.search(r"MemAvailable: *(\d+) kB", _read(MEMINFO))
    limit, used = _read(CONTROL_GROUP / "memory.max").strip(), _read(CONTROL_GROUP / "memory.current").strip()
    found = [1024 * int(machine[1])] if machine else []
    found += [int(limit) - int(used)] if limit.isdigit() and used.isdigit() else []
    return min(found, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _of_glibc(name: str) -> Callable | None:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None


def compute_on_main_thread() -> None:
    """Lets JAX compute on the thread that asks, before it computes anything: only the main thread's heap may be large,
    and others get blocks from outside of it after all."""
    import jax

    if computes_on_cpu():
        jax.config.update("jax_cpu_enable_async_dispatch", False)
