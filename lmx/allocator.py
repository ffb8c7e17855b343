"""How the C library gives memory to a computation on a CPU."""

import contextlib
import ctypes
import importlib.util
import os

ACCELERATORS = ("libtpu", "jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin")
# Of glibc's mallopt (malloc.h): one heap for all threads, no block outside of it, nothing of it given back.
OPTIONS = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}


def keep_freed_memory() -> None:
    """Lets this process use its memory again, where JAX computes on a CPU; before JAX is imported.

    A step's temporaries are some large blocks. The C library gives such blocks back to the system as soon as they are
    free, which then clears every page of them again for the next step: about a seventh of a small model's step. PyTorch
    advises its users to change the allocator for the same reason. It does nothing where the C library is not glibc.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms == "cpu" or not (platforms or any(map(importlib.util.find_spec, ACCELERATORS))):
        with contextlib.suppress(AttributeError, OSError, TypeError):
            mallopt = ctypes.CDLL(None).mallopt
            for option, value in OPTIONS.values():
                mallopt(option, value)
