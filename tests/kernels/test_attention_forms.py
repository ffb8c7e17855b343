"""Every form of attention, and its gradients, against the formula in float64; Pallas's kernel is interpreted here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.config import Mesh
from lmx.kernels.attention import cudnn
from lmx.kernels.attention.blockwise import blockwise_attention
from lmx.kernels.attention.pallas import pallas_attention
from lmx.kernels.attention.plain import plain_attention
from lmx.kernels.dropout import stream_factors, stream_words
from lmx.kernels.int8 import quantize
from lmx.parallel.sharding import Layout, use_layout
from tests.kernels.attention_reference import by_formula, draw

FORMS = {
    "plain": plain_attention,
    "blockwise": functools.partial(blockwise_attention, block=16),
    "pallas": functools.partial(pallas_attention, tile=128),
}


def with_gradients(form, problem, dtype=jnp.float32, **options):
    """The output where queries see a key, and the gradients."""
    query, key, value, bias = problem.arrays(dtype)
    seen = np.asarray(problem.mask.allowed(problem.window)).any(-1)[:, :, None, None]
    options |= {"scale": problem.scale, "window": problem.window}

    def loss(query, key, value, bias):
        output = form(query, key, value, problem.mask, bias=bias, **options)
        return (output.astype(jnp.float32) * jnp.asarray(problem.gradient, jnp.float32)).sum(), output

    which = (0, 1, 2) if bias is None else (0, 1, 2, 3)
    gradients, output = jax.jit(jax.grad(loss, argnums=which, has_aux=True))(query, key, value, bias)
    return np.where(seen, np.float64(output), 0), [np.float64(g) for g in gradients]


def assert_close(found, expected, tolerance):
    """Within ``tolerance`` of the largest value there is, or of 1."""
    for one, other in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(abs(other).max(), 1.0))


PROBLEMS = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "queries": st.integers(1, 70),
        "kv_heads": st.integers(1, 2),
        "groups": st.integers(1, 3),
        "head_dim": st.sampled_from([4, 8, 12]),
        "causal": st.booleans(),
        "prefix": st.booleans(),
        "window": st.sampled_from([0, 0, 1, 5, 40]),
        "bias": st.booleans(),
        "whole": st.booleans(),
    }
)


@pytest.mark.parametrize("form", ["plain", "blockwise"])
@pytest.mark.parametrize("examples", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_equals_the_formula_whatever_the_shape_and_the_mask(form, examples):
    @settings(max_examples=examples, deadline=None)
    @given(problem=PROBLEMS, seed=st.integers(0, 999))
    def check(problem, seed):
        problem = draw(np.random.default_rng(seed), **problem)
        assert_close(with_gradients(FORMS[form], problem), by_formula(problem), 1e-5)

    check()


@pytest.mark.parametrize("examples", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_kernel_equals_the_formula_whatever_the_shape_and_the_mask(examples):
    shapes = {"queries": st.integers(100, 400), "window": st.sampled_from([0, 0, 5, 200])}

    @settings(max_examples=examples, deadline=None)
    @given(problem=PROBLEMS, shape=st.fixed_dictionaries(shapes), seed=st.integers(0, 999))
    def check(problem, shape, seed):
        problem = draw(np.random.default_rng(seed), **problem | shape)
        assert_close(with_gradients(FORMS["pallas"], problem), by_formula(problem), 1e-5)

    check()


@pytest.mark.parametrize("causal", [False, True])
def test_kernel_writes_gradients_by_keys_that_the_last_queries_do_not_see(causal):
    # Its two grids are of one size here: three tiles each of queries and keys, and a head of keys for every head.
    problem = draw(np.random.default_rng(0), batch=1, queries=257, groups=1, head_dim=4, causal=causal, window=5)
    assert_close(with_gradients(FORMS["pallas"], problem), by_formula(problem), 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_formula_across_stacks(form):
    problem = draw(np.random.default_rng(0), queries=130, keys=300)
    assert_close(with_gradients(FORMS[form], problem), by_formula(problem), 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_rounds_like_bfloat16_and_no_worse(form):
    problem = draw(np.random.default_rng(0), queries=140, causal=True, bias=True).rounded(jnp.bfloat16)
    assert_close(with_gradients(FORMS[form], problem, jnp.bfloat16), by_formula(problem), 2e-2)


@pytest.mark.parametrize("form", FORMS)
def test_dropout_is_one_mask_for_both_passes_and_all_forms(form):
    problem = draw(np.random.default_rng(0), queries=150, causal=True, bias=True)
    rng = jax.random.key(3)
    found = with_gradients(FORMS[form], problem, dropout_rate=0.3, dropout_rng=rng)
    words = stream_words(rng, (2, 4))[:, :, None, None]
    kept = stream_factors(words[..., 0], words[..., 1], jnp.arange(150 * 150).reshape(150, 150), 0.3)
    assert_close(found, by_formula(problem, np.float64(kept)), 1e-5)


@pytest.mark.parametrize(
    "problem",
    [
        {"bias": True},
        {"bias": True, "causal": True},
        {"bias": True, "causal": True, "window": 30},
        {"bias": True, "causal": True, "whole": True},
        {"bias": True, "keys": 90},
        {"causal": True, "prefix": True, "window": 30},
    ],
    ids=str,
)
def test_what_surrounds_cudnns_kernel_is_right(problem, monkeypatch):
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    # A CPU sums in another order than from left to right, what holds documents apart included.
    tolerance = 1e-3 if problem.get("bias") and not problem.get("whole") else 1e-5
    problem = draw(np.random.default_rng(0), queries=70, **problem)
    assert_close(with_gradients(cudnn.cudnn_attention, problem), by_formula(problem), tolerance)


def test_documents_are_apart_whatever_the_scores(monkeypatch):
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    problem = draw(np.random.default_rng(0), queries=70, bias=True)
    mask, options = problem.mask, {"scale": 1.0, "bias": problem.arrays()[3]}
    query, key, value = (10 * x for x in problem.arrays()[:3])  # scores of a hundred
    other = (mask.key_segments != mask.key_segments[:, :1])[..., None, None]
    found = cudnn.cudnn_attention(query, key, value, mask, **options)
    changed = cudnn.cudnn_attention(query, *(jnp.where(other, -x, x) for x in (key, value)), mask, **options)
    same = np.asarray(~other & (mask.key_segments > 0)[..., None, None])
    np.testing.assert_allclose(np.where(same, found, 0), np.where(same, changed, 0), rtol=1e-5, atol=1e-5)
    assert np.abs(np.where(same, 0, found - changed)).max() > 1


def test_large_biases_have_the_gradient_of_what_cudnn_was_given(monkeypatch):
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    problem = draw(np.random.default_rng(0), queries=70, bias=True, causal=True).rounded(jnp.bfloat16)
    problem.bias = np.float64(jnp.asarray(10 * problem.bias, jnp.bfloat16))
    found = with_gradients(cudnn.cudnn_attention, problem, jnp.bfloat16)[1][3]
    expected = by_formula(problem)[1][3]
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02 * abs(expected).max())


@pytest.mark.parametrize(
    ("mesh", "problem"),
    [
        ({"data": 2, "tensor": 2, "fsdp": 2}, {"bias": True}),
        ({"data": 2, "tensor": 4}, {"causal": True}),  # fewer heads of keys than devices
        ({"data": 2, "sequence": 4}, {"causal": True, "window": 150}),
        ({"sequence": 2, "tensor": 2, "data": 2}, {"prefix": True, "causal": True}),
    ],
)
def test_kernel_gives_the_same_on_a_mesh(mesh, problem):
    problem = draw(np.random.default_rng(0), batch=4, queries=512, head_dim=4, **problem)
    with use_layout(Layout.of(Mesh(**mesh))):
        found = with_gradients(FORMS["pallas"], problem)
    assert_close(found, by_formula(problem), 1e-5)


@pytest.mark.parametrize("form", ["blockwise", "pallas"])
def test_nothing_as_large_as_the_square_of_the_length_is_held(form):
    problem = draw(np.random.default_rng(0), batch=1, queries=1024, causal=True, bias=True, kv_heads=1, groups=1)
    query, key, value, bias = problem.arrays()

    def loss(*arrays):
        query, key, value, bias = arrays
        return FORMS[form](query, key, value, problem.mask, scale=1.0, bias=bias).sum()

    def temporaries(loss):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(query, key, value, bias).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    square = 4 * 1024 * 1024
    assert temporaries(loss) < square
    assert temporaries(lambda q, k, v, b: plain_attention(q, k, v, problem.mask, bias=b).sum()) > square


def test_the_kernel_keeps_heads_side_by_side():
    """A TPU pads what is narrower than 128, and keeps heads that lie apart at several times their size."""
    problem = draw(np.random.default_rng(0), batch=2, queries=128, kv_heads=1, groups=3, head_dim=8)
    query, key, value, _ = problem.arrays()
    _, back = jax.vjp(lambda *arrays: FORMS["pallas"](*arrays, problem.mask), query, key, value)
    kept = [leaf.shape for leaf in jax.tree.leaves(back) if getattr(leaf, "size", 0) >= key.size]
    assert sorted(kept) == sorted([(2, 128, 24), (2, 128, 8), (2, 128, 8), (2, 128, 24)])


@settings(max_examples=5, deadline=None)
@given(PROBLEMS, st.integers(0, 99))
def test_keys_and_values_in_eight_bits_are_read_as_what_they_stand_for(sizes, seed):
    problem = draw(np.random.default_rng(seed), **sizes)
    query, key, value, bias = problem.arrays()
    kept = [quantize(x, (3,)) for x in (key, value)]
    key, value = (np.float64(x.dense("float32")) for x in kept)
    exact = dataclasses.replace(problem, key=key, value=value)
    found = plain_attention(query, *kept, problem.mask, scale=problem.scale, window=problem.window, bias=bias)
    seen = np.asarray(problem.mask.allowed(problem.window)).any(-1)[:, :, None, None]
    np.testing.assert_allclose(np.where(seen, found, 0), by_formula(exact)[0], rtol=0, atol=2e-5)
