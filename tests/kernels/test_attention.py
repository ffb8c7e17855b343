"""Masks and plain attention against loops over single pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.kernels.attention import Mask, attention
from tests.models.reference import allowed_loop, softmax

LENGTH = 7
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
PREFIX = np.array([[1, 1, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]])


def row_mask(segments=SEGMENTS, prefix=None, causal=False):
    index = jnp.arange(segments.shape[1])
    prefix = None if prefix is None else jnp.asarray(prefix)
    return Mask(jnp.asarray(segments), jnp.asarray(segments), index, index, prefix, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("window", [0, 1, 3])
def test_mask_is_the_loop_over_pairs(causal, with_prefix, window):
    mask = row_mask(prefix=PREFIX if with_prefix else None, causal=causal)
    expected = [
        allowed_loop(LENGTH, segments=s, causal=causal, prefix=p if with_prefix else None, window=window)
        for s, p in zip(SEGMENTS, PREFIX, strict=True)
    ]
    np.testing.assert_array_equal(mask.allowed(window), expected)


def test_mask_of_a_few_queries_goes_by_their_place_not_their_number():
    keys = jnp.arange(LENGTH)
    ones = jnp.ones((1, LENGTH), jnp.int32)
    mask = Mask(ones[:, :2], ones, jnp.array([4, 5]), keys, causal=True)
    np.testing.assert_array_equal(mask.allowed(), [[[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0]]])
    np.testing.assert_array_equal(mask.allowed(2), [[[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0]]])


def qkv(heads=4, kv_heads=4, length=LENGTH, head_dim=6):
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, head_dim)] + 2 * [(2, length, kv_heads, head_dim)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_the_formula_head_by_head(kv_heads):
    query, key, value = qkv(kv_heads=kv_heads)
    bias = jnp.asarray(np.random.default_rng(1).standard_normal((1, 4, LENGTH, LENGTH)), jnp.float32)
    mask = row_mask(np.ones((2, LENGTH), int), causal=True)
    output, weights = attention(query, key, value, mask, scale=0.3, window=4, bias=bias)
    allowed = allowed_loop(LENGTH, causal=True, window=4)
    for row in range(2):
        for head in range(4):
            shared = head // (4 // kv_heads)
            scores = 0.3 * np.asarray(query[row, :, head]) @ np.asarray(key[row, :, shared]).T + bias[0, head]
            expected = softmax(np.where(allowed, scores, -np.inf))
            np.testing.assert_allclose(weights[row, head], expected, atol=1e-6)
            np.testing.assert_allclose(output[row, :, head], expected @ value[row, :, shared], atol=1e-5)


def test_grouped_heads_are_repeated_key_and_value_heads():
    query, key, value = qkv(kv_heads=2)
    mask = row_mask()
    grouped = attention(query, key, value, mask)
    repeated = attention(query, jnp.repeat(key, 2, axis=2), jnp.repeat(value, 2, axis=2), mask)
    np.testing.assert_allclose(grouped[0], repeated[0], atol=1e-6)
    np.testing.assert_allclose(grouped[1], repeated[1], atol=1e-6)


def test_query_without_any_key_gets_the_mean_of_the_values_and_finite_gradients():
    query, key, value = qkv()
    mask = row_mask(np.zeros((2, LENGTH), int))
    output, _ = attention(query, key, value, mask)
    np.testing.assert_allclose(output, jnp.broadcast_to(value.mean(1, keepdims=True), output.shape), atol=1e-6)
    gradients = jax.grad(lambda *qkv: attention(*qkv, mask)[0].sum(), argnums=(0, 1, 2))(query, key, value)
    assert all(np.isfinite(g).all() for g in gradients)
    np.testing.assert_array_equal(gradients[0], np.zeros_like(gradients[0]))


def test_softmax_is_float32_under_bfloat16():
    query, key, value = (x.astype(jnp.bfloat16) for x in qkv())
    output, weights = attention(query, key, value, row_mask())
    assert output.dtype == jnp.bfloat16 and weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)  # bfloat16 weights miss this by 1e-3


def test_dropout_drops_whole_weights_and_keeps_their_mean():
    identity = jnp.broadcast_to(jnp.eye(64)[None, :, None, :], (2, 64, 4, 64))  # so that the output is the weights
    mask = row_mask(np.ones((2, 64), int))
    key = jax.random.key(0)
    query = jnp.zeros((2, 64, 4, 64))
    kept, weights = attention(query, query, identity, mask, dropout_rate=0.25, dropout_rng=key)
    np.testing.assert_allclose(weights, 1 / 64, atol=1e-7)
    values = np.unique(np.asarray(kept))
    np.testing.assert_allclose(values, [0.0, 1 / 64 / 0.75], atol=1e-7)
    assert abs((np.asarray(kept) == 0).mean() - 0.25) < 0.01  # 32,768 weights: standard error 0.0024
