"""Kernels on a GPU against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.kernels.attention.blockwise import blockwise_attention
from lmx.kernels.attention.cudnn import cudnn_attention
from lmx.kernels.attention.plain import plain_attention
from lmx.kernels.linear_cross_entropy import (
    Unembedding,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from tests.kernels.attention_reference import by_formula, draw
from tests.kernels.test_attention_forms import assert_close, with_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU")]

PROBLEMS = {
    "whole": {"whole": True},
    "causal": {"causal": True, "whole": True},
    "packed": {},
    "packed causal": {"causal": True},
    "window": {"causal": True, "window": 50},
    "prefix": {"causal": True, "prefix": True},
    "cross": {"keys": 384},
    "grouped heads": {"causal": True, "kv_heads": 2, "groups": 4},
    "bias": {"bias": True, "whole": True},
    "bias packed": {"bias": True},
    "bias packed causal": {"bias": True, "causal": True},
    "bias window": {"bias": True, "causal": True, "window": 50},
    "wide heads": {"causal": True, "head_dim": 128},
    "short": {"causal": True, "queries": 18},
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_cudnns_kernel_rounds_like_bfloat16_and_no_worse(problem):
    shape = {"queries": 256, "head_dim": 64} | PROBLEMS[problem]
    problem = draw(np.random.default_rng(0), **shape).rounded(jnp.bfloat16)
    assert_close(with_gradients(cudnn_attention, problem, jnp.bfloat16), by_formula(problem), 2e-2)


@pytest.mark.parametrize("form", [plain_attention, blockwise_attention])
def test_attention_without_it_equals_the_formula_in_float32(form):
    problem = draw(np.random.default_rng(0), queries=256, causal=True, bias=True, head_dim=64)
    with jax.default_matmul_precision("highest"):
        assert_close(with_gradients(form, problem), by_formula(problem), 1e-5)


def test_chunks_of_logits_give_the_loss_and_the_gradients_of_all_at_once():
    rng = np.random.default_rng(0)
    hidden, kernel = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((4, 100, 64), (1001, 64)))
    targets = jnp.asarray(rng.integers(0, 1001, (4, 100)))

    def loss_by(scorer, **options):
        def loss(hidden, kernel):
            return scorer(Unembedding(hidden, kernel), targets, jnp.ones((4, 100)), z_loss=1e-3, **options).loss

        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, kernel)

    found, expected = loss_by(linear_cross_entropy, chunk_logits=40_000), loss_by(linear_cross_entropy_reference)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
