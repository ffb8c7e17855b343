"""What is compiled for several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from lmx.config import Mesh
from lmx.parallel import compile as module
from lmx.parallel.sharding import Layout, put_batch


@pytest.fixture
def cache(tmp_path):
    """A compilation cache of the test's own."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path), 0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.parametrize(("devices", "version", "kept"), [(1, (0, 10, 2), 1), (2, (0, 10, 2), 0), (2, (0, 12, 0), 1)])
def test_programs_for_several_cpus_are_not_read_back_where_that_can_hang(cache, monkeypatch, devices, version, kept):
    monkeypatch.setattr(jax, "__version_info__", version)
    layout = Layout.of(Mesh(), jax.devices()[:devices])
    replicated = NamedSharding(layout.mesh, PartitionSpec())

    def a_step_of_its_own(state, batch):
        return {"sum": state + jnp.sum(batch["x"])}

    state = jax.device_put(jnp.zeros(()), replicated)
    batch = put_batch({"x": np.ones((4, 3), np.float32)}, layout.mesh)
    compiled = module.compile_step(a_step_of_its_own, "pjit", layout, replicated, updates=False)
    assert compiled(state, batch)["sum"] == 12
    assert len([file for file in cache.glob("*a_step_of_its_own*") if file.name.endswith("-cache")]) == kept
    assert jax.config.jax_enable_compilation_cache
