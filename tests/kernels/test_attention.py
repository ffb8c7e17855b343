"""Masks against loops over single pairs, plain attention against the formula, and what is chosen when."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.config import Mesh
from lmx.errors import ConfigError
from lmx.kernels import attention as kernels
from lmx.kernels.attention import Case, Mask, attention, attention_weights, choose
from lmx.kernels.attention.mask import bias_matrix
from lmx.parallel.sharding import Layout, use_layout
from tests.models.reference import allowed_loop, softmax

LENGTH = 7
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
PREFIX = np.array([[1, 1, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]])


def row_mask(segments=SEGMENTS, prefix=None, causal=False):
    segments = jnp.asarray(segments)
    return Mask(segments, segments, None, None if prefix is None else jnp.asarray(prefix), causal)


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


@pytest.mark.parametrize("causal", [False, True])
def test_mask_of_whole_rows_is_that_of_one_segment(causal):
    mask = row_mask(np.ones((2, LENGTH), int), causal=causal)
    whole = mask.replace(whole=True).allowed(3)
    np.testing.assert_array_equal(np.broadcast_to(whole, (2, LENGTH, LENGTH)), mask.allowed(3))


def test_mask_of_a_few_queries_goes_by_their_place_not_their_number():
    ones = jnp.ones((1, LENGTH), jnp.int32)
    mask = Mask(ones[:, :2], ones, jnp.array(4), causal=True)
    np.testing.assert_array_equal(mask.allowed(), [[[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0]]])
    np.testing.assert_array_equal(mask.allowed(2), [[[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0]]])


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 6), (4, 9), (6, 2)])
def test_bias_matrix_reads_the_distance_of_key_and_query(queries, keys):
    bias = jnp.asarray(np.random.default_rng(0).standard_normal((3, queries + keys - 1)), jnp.float32)
    matrix = bias_matrix(bias, queries)
    expected = [[bias[:, k - q + queries - 1] for k in range(keys)] for q in range(queries)]
    np.testing.assert_array_equal(matrix, np.transpose(expected, (2, 0, 1)))


def test_distances_are_those_of_the_bias():
    ones = jnp.ones((1, LENGTH), jnp.int32)
    np.testing.assert_array_equal(Mask(ones, ones).distances(), np.arange(-6, 7))
    np.testing.assert_array_equal(Mask(ones[:, :2], ones, jnp.array(4)).distances(), np.arange(-5, 3))


def qkv(heads=4, kv_heads=4, length=LENGTH, head_dim=6):
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, head_dim)] + 2 * [(2, length, kv_heads, head_dim)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_the_formula_head_by_head(kv_heads):
    query, key, value = qkv(kv_heads=kv_heads)
    bias = jnp.asarray(np.random.default_rng(1).standard_normal((4, 2 * LENGTH - 1)), jnp.float32)
    mask = row_mask(np.ones((2, LENGTH), int), causal=True)
    options = {"scale": 0.3, "window": 4, "bias": bias}
    output, weights = attention(query, key, value, mask, **options), attention_weights(query, key, mask, **options)
    allowed = allowed_loop(LENGTH, causal=True, window=4)
    for row in range(2):
        for head in range(4):
            shared = head // (4 // kv_heads)
            scores = 0.3 * np.asarray(query[row, :, head]) @ np.asarray(key[row, :, shared]).T
            scores += [[bias[head, k - q + LENGTH - 1] for k in range(LENGTH)] for q in range(LENGTH)]
            expected = softmax(np.where(allowed, scores, -np.inf))
            np.testing.assert_allclose(weights[row, head], expected, atol=1e-6)
            np.testing.assert_allclose(output[row, :, head], expected @ value[row, :, shared], atol=1e-5)


@pytest.mark.parametrize("implementation", ["plain", "blockwise"])
def test_query_without_any_key_is_finite_and_has_no_gradient(implementation):
    query, key, value = qkv()
    mask = row_mask(np.array([[0] * LENGTH, [1] * LENGTH]))

    def loss(*qkv):
        output = attention(*qkv, mask, implementation=implementation)
        return output[1].sum(), output

    gradients, output = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)
    assert np.isfinite(output).all() and all(np.isfinite(g).all() for g in gradients)
    np.testing.assert_array_equal(gradients[0][0], np.zeros_like(gradients[0][0]))


def test_softmax_is_float32_under_bfloat16():
    query, key, value = (x.astype(jnp.bfloat16) for x in qkv())
    weights = attention_weights(query, key, row_mask())
    assert attention(query, key, value, row_mask()).dtype == jnp.bfloat16 and weights.dtype == jnp.float32
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)  # bfloat16 weights miss this by 1e-3


@pytest.mark.parametrize("implementation", ["plain", "blockwise"])
def test_dropout_drops_whole_weights_and_keeps_their_mean(implementation):
    identity = jnp.broadcast_to(jnp.eye(64)[None, :, None, :], (2, 64, 4, 64))  # so that the output is the weights
    mask = row_mask(np.ones((2, 64), int))
    query, key = jnp.zeros((2, 64, 4, 64)), jax.random.key(0)
    dropout = {"dropout_rate": 0.25, "dropout_rng": key}
    kept = attention(query, query, identity, mask, implementation=implementation, **dropout)
    values = np.unique(np.asarray(kept))
    np.testing.assert_allclose(values, [0.0, 1 / 64 / 0.75], atol=1e-7)
    assert abs((np.asarray(kept) == 0).mean() - 0.25) < 0.01  # 32,768 weights: standard error 0.0024


CASE = {"rows": 8, "queries": 2048, "keys": 2048, "heads": 8, "head_dim": 64, "dtype": "bfloat16"}


def chosen(platform, asked="auto", mesh=None, monkeypatch=None, **case):
    """What is chosen on a platform, as if the devices of ``mesh`` were of it."""
    monkeypatch.setattr(kernels, "current_platform", lambda: platform)
    with use_layout(Layout.of(Mesh(**(mesh or {"data": 1})), jax.devices()[: 4 if mesh else 1])):
        return choose(asked, Case(**CASE | case))


@pytest.mark.parametrize(
    ("platform", "case", "name", "reason"),
    [
        ("gpu", {}, "cudnn", ""),
        ("gpu", {"dtype": "float32"}, "blockwise", "model.dtype is float32"),
        ("gpu", {"has_bias": True, "head_dim": 112}, "cudnn", ""),
        ("gpu", {"has_bias": True, "head_dim": 120}, "blockwise", "at most 112 wide, not 120"),
        ("gpu", {"has_bias": True, "has_prefix": True}, "blockwise", "by distance in rows with a prefix"),
        ("gpu", {"has_bias": True, "is_whole": True, "queries": 1023, "keys": 1023}, "plain", "even length"),
        ("gpu", {"mesh": {"tensor": 4}, "heads": 6}, "blockwise", "heads of 6 does not divide over 4 devices"),
        ("gpu", {"has_bias": True, "rows": 32, "is_whole": True}, "cudnn", ""),
        ("gpu", {"has_bias": True, "rows": 16, "mesh": {"data": 2, "tensor": 2}}, "cudnn", ""),
        ("gpu", {"has_dropout": True}, "blockwise", "model.attention_dropout"),
        ("gpu", {"head_dim": 160}, "blockwise", "at most 128 wide, not 160"),
        ("gpu", {"queries": 1023, "keys": 1023}, "plain", "even length, not 1023"),
        ("gpu", {"queries": 1023, "keys": 1023, "is_whole": True}, "cudnn", ""),
        ("gpu", {"mesh": {"sequence": 4}}, "plain", "mesh.sequence"),
        ("tpu", {}, "pallas", ""),
        ("tpu", {"dtype": "float32", "has_bias": True, "has_dropout": True}, "pallas", ""),
        ("tpu", {"mesh": {"sequence": 4}}, "pallas", ""),
        ("tpu", {"mesh": {"sequence": 4}, "has_bias": True}, "plain", "bias by distance on a device (mesh.sequence)"),
        ("tpu", {"mesh": {"tensor": 4}, "heads": 6}, "blockwise", "heads of 6 does not divide over 4 devices"),
        ("cpu", {}, "blockwise", "no fused kernel exists for cpu"),
        ("cpu", {"queries": 512, "keys": 512}, "plain", "no fused kernel exists for cpu"),
        ("tpu", {"queries": 1, "is_decoding": True}, "plain", ""),
    ],
)
def test_the_fastest_form_is_chosen_and_why_not_a_faster_one_is_said(platform, case, name, reason, monkeypatch):
    choice = chosen(platform, monkeypatch=monkeypatch, **case)
    assert choice.name == name
    assert reason in str(choice) and bool(choice.reason) == bool(reason)


def test_flash_that_cannot_be_had_is_an_error_with_the_reason(monkeypatch):
    message = r"model.attention='flash' cannot be had: no fused kernel exists for cpu. .*'auto'"
    with pytest.raises(ConfigError, match=message):
        chosen("cpu", "flash", monkeypatch=monkeypatch)
    with pytest.raises(ConfigError, match="would drop the same weights at every step"):
        chosen("gpu", "flash", has_dropout=True, monkeypatch=monkeypatch)
    assert chosen("tpu", "flash", monkeypatch=monkeypatch).name == "pallas"
    assert chosen("tpu", "plain", monkeypatch=monkeypatch).name == "plain"
    assert chosen("gpu", "blockwise", queries=8, keys=8, monkeypatch=monkeypatch).name == "blockwise"
