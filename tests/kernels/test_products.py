"""Products against float64, whichever way a kernel lies and however many rows there are, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.kernels import products
from lmx.kernels.int8 import quantize
from lmx.kernels.products import FEW_ROWS, Turned, product, product_by_rows

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=2)


@pytest.mark.parametrize("examples", [12, pytest.param(60, marks=pytest.mark.slow)])
def test_equals_the_definition_turned_or_not(examples):
    @settings(max_examples=examples, deadline=None)
    @given(st.integers(0, 99), SIZES, SIZES, SIZES, st.booleans(), st.sampled_from(["float32", "bfloat16"]))
    def check(seed, rows, inputs, outputs, eight_bits, dtype):
        rng = np.random.default_rng(seed)
        x = jnp.asarray(rng.standard_normal((*rows, *inputs)), dtype)
        kernel = jnp.asarray(rng.standard_normal((*inputs, *outputs)), dtype)
        used, exact = kernel, np.float64(kernel)
        if eight_bits:
            used = quantize(kernel, range(len(inputs)))
            exact = np.float64(used.dense("float32"))
        expected = np.tensordot(np.float64(x), exact, len(inputs))
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.02, "atol": 0.2}
        for form in (used, Turned.of(used, len(inputs))):
            found = product(x, form, len(inputs))
            assert found.dtype == x.dtype
            np.testing.assert_allclose(np.float64(found), expected, **tolerance)
        if not eight_bits:
            weights = rng.standard_normal(expected.shape)
            total = jax.grad(lambda x, kernel: jnp.sum(weights * product(x, kernel, len(inputs))), (0, 1))
            of_rows, of_outputs = range(len(rows)), range(len(inputs), kernel.ndim)
            for_x = np.tensordot(weights, np.float64(kernel), (range(len(rows), weights.ndim), of_outputs))
            for_kernel = np.tensordot(np.float64(x), weights, (of_rows, of_rows))
            for found, wanted in zip(total(x, kernel), (for_x, for_kernel), strict=True):
                assert found.dtype == x.dtype
                np.testing.assert_allclose(np.float64(found), wanted, **tolerance)

    check()


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
def test_few_rows_have_the_gradients_of_many(rows):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((rows, 6), (9, 6)))
    weights = rng.standard_normal((rows, 9))
    of_x, of_kernel = jax.grad(lambda *args: jnp.sum(weights * product_by_rows(*args)), (0, 1))(x, kernel)
    np.testing.assert_allclose(of_x, weights @ np.float64(kernel), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_kernel, weights.T @ np.float64(x), rtol=1e-5, atol=1e-5)


def test_a_cpu_reads_the_kernel_first_where_rows_are_few(monkeypatch):
    x, kernel = jnp.zeros((8, 64)), jnp.zeros((96, 64))
    on_cpu = jax.jit(product_by_rows).lower(x, kernel).compile().as_text()
    assert "f32[96,8]" in on_cpu  # [outputs, rows], which is then turned
    monkeypatch.setattr(products.jax, "default_backend", lambda: "gpu")
    elsewhere = jax.jit(lambda *args: product_by_rows(*args)).lower(x, kernel).compile().as_text()
    assert "f32[96,8]" not in elsewhere
