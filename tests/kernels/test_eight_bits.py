"""Products of eight-bit numbers: those of the rounded numbers, forward and back, and near enough to learn by."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from lmx.config import Experts, Model
from lmx.errors import LmxError
from lmx.kernels.eight_bits import FORMATS, eight_bit_product
from lmx.models.transformer import Transformer, init_params


def rounded(x, axes):
    """As the library rounds, with a scale for all that differs along ``axes`` only: to half a 127th of the largest."""
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    found = np.float64(qwix.dequantize(qwix.quantize(jnp.asarray(x, jnp.float32), jnp.int8, channelwise_axes=kept)))
    assert (abs(found - x) <= abs(x).max(axes, keepdims=True) * 0.502 / 127).all()
    return found


def both(x, kernel, gradient, num_inputs, form):
    y, back = jax.vjp(lambda x, kernel: eight_bit_product(x, kernel, num_inputs, form), x, kernel)
    return y, *back(gradient)


def operands(num_inputs):
    rng = np.random.default_rng(0)
    shape = (24,) if num_inputs == 1 else (4, 6)
    of = (2, 5, *shape), (*shape, 3, 7), (2, 5, 3, 7)
    return tuple(rng.standard_normal(size) * 10.0 ** rng.uniform(-2, 2, size[:2] + (1,) * len(size[2:])) for size in of)


@pytest.mark.parametrize("num_inputs", [1, 2])
def test_they_are_products_of_the_rounded_numbers(num_inputs):
    x, kernel, gradient = operands(num_inputs)
    inputs, outputs = tuple(range(2, 2 + num_inputs)), tuple(range(num_inputs, num_inputs + 2))
    y, of_x, of_kernel = both(*(jnp.asarray(a, jnp.float32) for a in (x, kernel, gradient)), num_inputs, "int8")
    expected = np.tensordot(rounded(x, inputs), rounded(kernel, tuple(range(num_inputs))), num_inputs)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())
    expected = np.tensordot(rounded(gradient, (2, 3)), rounded(kernel, outputs), ((2, 3), outputs))
    np.testing.assert_allclose(of_x, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())
    expected = np.tensordot(x, gradient, ((0, 1), (0, 1)))
    np.testing.assert_allclose(of_kernel, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize(("form", "error"), [("int8", 0.02), ("fp8", 0.06)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_they_are_near_the_exact_products(form, error, dtype):
    rng = np.random.default_rng(1)
    x, kernel, gradient = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((64, 96), (96, 80), (64, 80)))
    found = both(x, kernel.astype(jnp.float32), gradient, 1, form)
    exact = x @ kernel, gradient @ kernel.T, x.T @ gradient
    assert [part.dtype for part in found] == [dtype, dtype, jnp.float32]
    for one, other in zip(found, exact, strict=True):
        one, other = np.float64(one), np.float64(other)
        assert np.linalg.norm(one - other) < error * np.linalg.norm(other)


@pytest.mark.parametrize("form", FORMATS)
def test_rows_of_zeros_stay_zeros(form):
    zeros = jnp.zeros((3, 8))
    for part in both(zeros, jnp.ones((8, 4)), jnp.zeros((3, 4)), 1, form):
        np.testing.assert_array_equal(part, jnp.zeros_like(part))


def model_of(products, **changes):
    sizes = {"vocab_size": 50, "num_layers": 2, "embed_dim": 32, "num_heads": 2, "mlp_dim": 64, "max_length": 16}
    return Transformer(Model(**sizes | {"products": products, "heads": ("lm",)} | changes))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("changes", [{}, {"experts": Experts(num_experts=2, jitter=0.0)}], ids=["dense", "experts"])
def test_a_model_of_them_has_nearly_the_same_gradients(form, changes):
    batch = {"tokens": jnp.asarray(np.random.default_rng(0).integers(0, 50, (4, 16)), jnp.int32)}
    params = nn.meta.unbox(init_params(model_of("dtype", **changes), jax.random.key(0)))

    def gradients(products):
        model = model_of(products, **changes)
        return jax.jit(jax.grad(lambda p: (model.apply({"params": p}, batch)["lm_logits"] ** 2).mean()))(params)

    found, expected = map(jax.tree.leaves, (gradients(form), gradients("dtype")))
    distance = sum(float(((a - b) ** 2).sum()) for a, b in zip(found, expected, strict=True))
    assert 0 < distance < 0.1**2 * sum(float((b**2).sum()) for b in expected)


def test_the_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(LmxError, match=r"model.products of int8 or fp8 needs the package 'qwix'.*lmx\[quantized\]"):
        eight_bit_product(jnp.ones((2, 3)), jnp.ones((3, 4)), 1, "int8")
