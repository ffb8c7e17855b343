"""Dropout keeps what it should, as often as it should, and its mask is the key's alone."""

import itertools

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
    for axis, step in itertools.product((0, 1), (1, 2, 8, 64)):
        ahead = np.take(kept, range(step, 1000), axis)
        both = ahead & np.take(kept, range(1000 - step), axis)
        assert abs(both.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / both.size)


def test_keys_are_independent_and_streams_too():
    kept = np.stack([np.asarray(dropout(jax.random.key(i), jnp.ones((50, 4000)), 0.5)) != 0 for i in range(4)])
    for one, other in [*itertools.combinations(kept, 2), *itertools.pairwise(kept.swapaxes(0, 1))]:
        assert abs((one & other).mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / one.size)


def test_nothing_as_large_as_the_mask_is_kept():
    _, back = jax.vjp(lambda x: dropout(KEY, x, 0.5), jnp.ones((100, 100)))
    assert sum(leaf.size for leaf in jax.tree.leaves(back) if hasattr(leaf, "size")) <= 200


def test_a_layer_that_is_computed_again_drops_the_same():
    def loss(x, again):
        def layer(x, key):
            return dropout(key, jnp.sin(x), 0.5), None

        keys = jax.random.split(KEY, 3)
        return (jax.lax.scan(jax.checkpoint(layer) if again else layer, x, keys)[0] ** 2).sum()

    x = jnp.linspace(0.1, 1.0, 100).reshape(4, 25)
    again, once = (jax.jit(jax.grad(loss), static_argnums=1)(x, again) for again in (True, False))
    np.testing.assert_allclose(again, once, rtol=1e-6)
    assert np.count_nonzero(once) and np.count_nonzero(once == 0)


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
