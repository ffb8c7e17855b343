"""Memory that was used once is there for the next step."""

import ctypes
import importlib.util
import os
import subprocess
import sys

import pytest

from lmx import allocator
from lmx.allocator import available_memory, computes_on_cpu

STEPS = """
import resource, sys
from lmx.allocator import compute_on_main_thread, keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
    compute_on_main_thread()
import jax

double = jax.jit(lambda x: x * 2)
x = jax.numpy.ones(25_000_000)
faults = []
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    double(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[20])  # a result may be freed late, by another thread; the next one is then new memory
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc")
def test_pages_are_not_cleared_again():
    def faults(what):
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", STEPS, what]
        return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)

    assert faults("keep") < 1000 < faults("leave")  # a hundred MB are 24,000 pages


GIVEN_BACK = """
import numpy as np
from pathlib import Path
from lmx.allocator import give_freed_memory_back, keep_freed_memory

def resident():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmRSS")) // 1024

keep_freed_memory()
before = resident()
block = np.ones(25_000_000)
del block
kept = resident()
give_freed_memory_back()
print(kept - before, resident() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc")
def test_what_is_kept_can_be_given_back():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", GIVEN_BACK], env=environment, capture_output=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept > 150 and left < 50  # MiB, of two hundred


@pytest.mark.parametrize(
    ("platforms", "package", "expected"),
    [("cpu", "libtpu", True), ("", "libtpu", False), ("", None, True), ("cuda", None, False)],
)
def test_an_accelerator_is_left_alone(platforms, package, expected, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == package or None)
    assert computes_on_cpu() is expected


@pytest.mark.parametrize(
    ("machine", "limit", "used", "expected"),
    [
        ("MemTotal: 99 kB\nMemAvailable:   40 kB\n", "max", "1024", 40 * 1024),
        ("MemAvailable: 40 kB\n", "30720", "10240", 20 * 1024),
        ("MemAvailable: 10 kB\n", "30720", "10240", 10 * 1024),
        ("MemAvailable: 40 kB\n", None, None, 40 * 1024),
        (None, None, None, None),
    ],
)
def test_available_memory_is_what_the_machine_and_a_container_have(
    machine, limit, used, expected, tmp_path, monkeypatch
):
    for name, text in {"meminfo": machine, "memory.max": limit, "memory.current": used}.items():
        if text is not None:
            (tmp_path / name).write_text(text)
    monkeypatch.setattr(allocator, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(allocator, "CONTROL_GROUP", tmp_path)
    assert available_memory() == expected
