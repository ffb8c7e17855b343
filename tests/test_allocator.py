"""Memory that was used once is there for the next step."""

import ctypes
import subprocess
import sys

import pytest

ASK_TWICE = """
import resource, sys
import numpy as np
from lmx.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(25_000_000)  # 200 MB, written to
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc")
def test_pages_are_not_cleared_again():
    def faults(what):
        return int(subprocess.run([sys.executable, "-c", ASK_TWICE, what], capture_output=True, check=True).stdout)

    assert faults("keep") < 100 < faults("leave")
