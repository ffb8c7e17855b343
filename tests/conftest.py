"""Every test sees eight CPU devices, unless it asks for a GPU, and a compilation cache that outlives the run."""

import getpass
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is for all workers
# Most of the time goes into compiling programs that run for milliseconds; without LLVM's passes it takes a third less.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update(
    "jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), f"lmx-jax-cache-{getpass.getuser()}")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session", autouse=True)
def loops_over_layers():
    """Loops over layers stay loops, as on an accelerator: they are what most users run, and they compile sooner."""
    from lmx.models import stack

    stack.MOST_UNROLLED = 0
