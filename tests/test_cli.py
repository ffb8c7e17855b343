"""What every command sets up."""

import jax
import pytest

from lmx import cli


@pytest.fixture
def settings():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_unless_jax_is_told_otherwise(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "compute_on_main_thread", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    before = jax.config.jax_compilation_cache_dir
    cli._set_up_jax()
    assert jax.config.jax_compilation_cache_dir == before
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    cli._set_up_jax()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "lmx" / "jax")
    assert jax.config.jax_persistent_cache_min_compile_time_secs <= 1
