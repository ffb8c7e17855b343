"""Importing lmx stays light, and its lazy names are there."""

import subprocess
import sys

import pytest

import lmx

HEAVY = ("tensorflow", "torch", "transformers", "tensorflow_datasets", "grain", "tokenizers", "matplotlib")


def loaded_after(code):
    """The top-level modules that a fresh Python has loaded after running ``code``."""
    code += "\nimport sys\nprint(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_import_lmx_loads_not_even_jax():
    loaded = loaded_after("import lmx")
    assert "lmx" in loaded
    assert not loaded & {"jax", "flax", "numpy", *HEAVY}


def test_opening_models_needs_no_heavy_package():
    loaded = loaded_after("import lmx; lmx.load, lmx.LanguageModel, lmx.Config")
    assert {"jax", "flax"} <= loaded
    assert not loaded & set(HEAVY)


def test_the_package_says_what_it_holds():
    assert {"load", "LanguageModel", "Config", "__version__"} <= set(dir(lmx))
    assert lmx.__version__ == "0.1.0"
    assert lmx.Config().model.num_layers == 12
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = lmx.lod
