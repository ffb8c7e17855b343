"""Every test sees eight CPU devices and a compilation cache that outlives the run."""

import getpass
import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update(
    "jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), f"lmx-jax-cache-{getpass.getuser()}")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
