"""Dropout keeps what it should, as often as it should, and its mask is the key's alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.config import Mesh
from lmx.kernels.dropout import dropout
from lmx.parallel.sharding import Layout, constrain, use_layout

KEY = jax.random.key(3)


@pytest.mark.parametrize("shape", [(400, 301), (2, 3, 20001), (120000,)])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_values_are_zero_at_the_rate_and_scaled_so_that_the_mean_stays(shape, rate):
    found = np.asarray(dropout(KEY, jnp.full(shape, 2.0), rate))
    kept = found != 0
    assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / found.size)
    np.testing.assert_allclose(found[kept], 2.0 / (1 - round(rate * 65536) / 65536), rtol=1e-6)


def test_neighbours_are_independent():
    kept = np.asarray(dropout(KEY, jnp.ones((1000, 1000)), 0.5)) != 0
    for axis in (0, 1):  # two values share a word of random bits along the last axis
        both = np.take(kept, range(0, 1000, 2), axis) & np.take(kept, range(1, 1000, 2), axis)
        assert abs(both.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / both.size)


def test_rates_at_the_ends():
    x = jnp.arange(4.0)
    np.testing.assert_array_equal(dropout(KEY, x, 0.0), x)
    np.testing.assert_array_equal(dropout(KEY, x, 1.0), jnp.zeros(4))


def test_gradients_pass_where_values_do():
    x = jnp.arange(1.0, 101.0)
    gradient = jax.grad(lambda x: dropout(KEY, x, 0.25).sum())(x)
    np.testing.assert_array_equal(gradient * x, dropout(KEY, x, 0.25))


def test_bfloat16_stays():
    assert dropout(KEY, jnp.ones(8, jnp.bfloat16), 0.5).dtype == jnp.bfloat16


def test_the_mask_is_the_same_on_any_mesh():
    x = jnp.ones((8, 16, 64))
    layout = Layout.of(Mesh(data=2, sequence=2, tensor=2), jax.devices())

    def masked(x):
        return constrain(dropout(KEY, constrain(x, "batch", "length", "mlp"), 0.5), "batch", "length", "mlp")

    with use_layout(layout):
        found = jax.jit(masked)(x)
    np.testing.assert_array_equal(found, dropout(KEY, x, 0.5))
