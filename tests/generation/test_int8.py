"""Eight-bit weights and caches: what is computed is the model of the rounded numbers, and it is near the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.config import Experts
from lmx.generation.decode import prefill
from lmx.generation.forms import is_quantized, quantize_params
from lmx.generation.generate import generate, pad_prompts
from lmx.kernels.int8 import Quantized, quantize
from lmx.kernels.products import product
from lmx.models.heads import num_params
from tests.generation.test_decode import NEW, PROMPTS, _advance, make


def test_numbers_are_rounded_to_a_127th_of_the_largest_that_shares_their_scale():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 5, 4)), jnp.float32) * 10.0 ** jnp.arange(4)
    found = quantize(x, (0, 1))
    assert found.values.dtype == jnp.int8 and found.scale.shape == (1, 1, 4)
    np.testing.assert_allclose(found.scale[0, 0], np.abs(x).max((0, 1)) / 127, rtol=1e-6)
    assert (np.abs(found.dense("float32") - x) <= found.scale * 0.5001).all()
    np.testing.assert_array_equal(quantize(jnp.zeros((3, 2)), (0,)).dense("float32"), jnp.zeros((3, 2)))


def test_product_is_that_of_the_rounded_kernel():
    rng = np.random.default_rng(0)
    x, kernel = jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.float32), rng.standard_normal((3, 4, 5, 6))
    quantized = quantize(jnp.asarray(kernel), (0, 1))
    expected = np.einsum("nab,abcd->ncd", np.float64(x), np.float64(quantized.dense("float32")))
    np.testing.assert_allclose(product(x, quantized, 2), expected, rtol=1e-5, atol=1e-5)


KINDS = {
    "decoder": {"position": "learned"},
    "gated": {"position": "rotary", "activation": "swiglu", "num_kv_heads": 2, "tie_embeddings": False},
    "unrolled": {"scan_layers": False, "position": "rotary"},
    "switch": {"experts": Experts(num_experts=3, eval_capacity_factor=3.0)},
    "encoder_decoder": {"architecture": "encoder_decoder", "position": "relative"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_is_the_model_of_its_rounded_parameters(kind):
    model, params = make(**KINDS[kind])
    quantized = quantize_params(model, params)
    leaves = jax.tree.leaves(quantized, is_leaf=lambda x: isinstance(x, Quantized))
    rounded = jax.tree.map(
        lambda x: x.dense("float32") if isinstance(x, Quantized) else x,
        quantized,
        is_leaf=lambda x: isinstance(x, Quantized),
    )
    eight_bits = sum(leaf.values.size for leaf in leaves if isinstance(leaf, Quantized))
    assert eight_bits > 0.8 * num_params(params) and num_params(quantized) == num_params(params)
    assert is_quantized(quantized) and not is_quantized(params)

    tokens, segments = pad_prompts(PROMPTS, 8, 0, left=kind != "encoder_decoder")
    found, expected, exact = (
        np.asarray(prefill(model, p, tokens, segments, new_slots=4)[0]) for p in (quantized, rounded, params)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert 1e-6 < np.abs(found - exact).max() / np.abs(exact).max() < 0.1
    rows = generate(model, quantized, PROMPTS, max_new_tokens=4)
    assert rows == generate(model, rounded, PROMPTS, max_new_tokens=4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_in_eight_bits_scores_nearly_the_same(kind):
    model, params = make(**KINDS[kind])
    tokens, segments = pad_prompts(PROMPTS, 8, 0, left=kind != "encoder_decoder")
    found = []
    for int8 in (False, True):
        logits, decoding = prefill(model, params, tokens, segments, new_slots=4, int8_cache=int8)
        steps = [logits]
        for column in np.asarray(NEW).T:
            logits, decoding = _advance(model, params, column, decoding)
            steps.append(logits)
        found.append(np.stack(steps))
        types = {leaf.dtype for leaf in jax.tree.leaves(decoding.variables)}
        assert (jnp.dtype("int8") in types) == int8
    exact, rounded = found
    if kind != "encoder_decoder":  # its first token reads the encoder through the cache
        np.testing.assert_array_equal(rounded[0], exact[0])
    assert 1e-6 < np.abs(rounded[1:] - exact[1:]).max() / np.abs(exact).max() < 0.05
