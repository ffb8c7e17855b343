"""Positions against values worked out by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from lmx.config import RotaryScaling
from lmx.models.positions import relative_bucket, rotary_frequencies, rotate, sinusoidal
from tests.models.reference import build, example, small


def test_sinusoids_by_hand():
    waves = sinusoidal(jnp.array([[0, 1, 7]]), 4)[0]
    for row, position in enumerate((0, 1, 7)):
        fast, slow = position / 10000 ** (0 / 4), position / 10000 ** (2 / 4)
        expected = [math.sin(fast), math.cos(fast), math.sin(slow), math.cos(slow)]
        np.testing.assert_allclose(waves[row], expected, atol=1e-6)


def test_rotation_by_hand():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 1, 4)), jnp.float32)
    a, b, c, d = np.asarray(x[0, 0, 0])
    fast, slow = 5 * 1.0, 5 * 100.0**-0.5  # base 100, position 5: frequencies 1 and 1/10
    expected = [
        a * math.cos(fast) - c * math.sin(fast),
        b * math.cos(slow) - d * math.sin(slow),
        c * math.cos(fast) + a * math.sin(fast),
        d * math.cos(slow) + b * math.sin(slow),
    ]
    np.testing.assert_allclose(
        rotate(x, jnp.array([[5]]), small(position="rotary", rotary_base=100.0))[0, 0, 0], expected, atol=1e-6
    )


def test_rotary_scores_depend_on_distance_alone():
    rng = np.random.default_rng(1)
    query, key = (jnp.asarray(rng.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(at, to):
        config = small(position="rotary")
        return float((rotate(query, jnp.array([[at]]), config) * rotate(key, jnp.array([[to]]), config)).sum())

    np.testing.assert_allclose(score(3, 1), score(13, 11), atol=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-2
    np.testing.assert_allclose(score(4, 4), float((query * key).sum()), atol=1e-5)


def test_a_fraction_rotates_the_first_dimensions_alone():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 2, 8)), jnp.float32)
    positions = jnp.array([[2, 3, 9]])
    part = rotate(x, positions, small(position="rotary", rotary_fraction=0.5))
    np.testing.assert_array_equal(part[..., 4:], x[..., 4:])
    np.testing.assert_allclose(part[..., :4], rotate(x[..., :4], positions, small(position="rotary")), atol=1e-6)


def frequencies(length=8, **scaling):
    config = small(position="rotary", rotary_scaling=RotaryScaling(original_length=64, **scaling))
    return rotary_frequencies(config, 8, jnp.arange(length)[None])


def test_scaled_frequencies_by_hand():
    plain = 10000.0 ** (-np.arange(4) / 4)  # turns over 64 tokens: 10.2, 1.02, 0.102, 0.0102
    found, scale = frequencies(kind="linear", factor=4.0)
    np.testing.assert_allclose(found, plain / 4)
    assert scale == 1.0
    found, _ = frequencies(kind="llama3", factor=4.0, low_frequency_factor=0.5, high_frequency_factor=2.0)
    kept = (64 / (2 * np.pi / plain[1]) - 0.5) / 1.5  # of the second pair; the first stays, the others are divided
    np.testing.assert_allclose(found, plain * [1, kept + (1 - kept) / 4, 1 / 4, 1 / 4])
    # The pair that turns 4 times is 8 ln(64/8pi) / (2 ln 1e4) = 0.41, and that turns 0.05 times 2.3: from 0 to 3.
    found, scale = frequencies(kind="yarn", factor=4.0, beta_fast=4.0, beta_slow=0.05)
    divided = np.array([0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(found, plain * (1 - divided) + plain / 4 * divided)
    np.testing.assert_allclose(scale, 0.1 * math.log(4) + 1)


def test_dynamic_scaling_grows_with_the_row():
    plain = 10000.0 ** (-np.arange(4) / 4)
    short, _ = frequencies(kind="dynamic", factor=2.0, length=64)
    np.testing.assert_allclose(short, plain, rtol=1e-5)
    grown, _ = frequencies(kind="dynamic", factor=2.0, length=128)
    base = 10000.0 * (2 * 128 / 64 - 1) ** (8 / 6)
    np.testing.assert_allclose(grown, base ** (-np.arange(4) / 4), rtol=1e-5)


# T5's usual 32 buckets up to distance 128. Bidirectional: 16 a side, 8 of them exact, then
# 8 + floor(8 log(d/8) / log(128/8)): distance 16 is 8 + 2, 32 is 8 + 4, 64 is 8 + 6, from 128 on 15.
BIDIRECTIONAL = {
    0: 0,
    -1: 1,
    -7: 7,
    -8: 8,
    -11: 8,
    -12: 9,
    -15: 9,
    -16: 10,
    -32: 12,
    -64: 14,
    -90: 14,
    -91: 15,
    -127: 15,
    -128: 15,
    -5000: 15,
    1: 17,
    7: 23,
    8: 24,
    16: 26,
    127: 31,
    5000: 31,
}
# Causal: all 32 look back, 16 exact, then 16 + floor(16 log(d/16) / log(128/16)).
CAUSAL = {5: 0, 1: 0, 0: 0, -1: 1, -15: 15, -16: 16, -18: 16, -19: 17, -32: 21, -64: 26, -112: 30, -113: 31, -4000: 31}


@pytest.mark.parametrize("bidirectional, cases", [(True, BIDIRECTIONAL), (False, CAUSAL)])
def test_relative_buckets_by_hand(bidirectional, cases):
    found = relative_bucket(jnp.array([list(cases)]), 32, 128, bidirectional)[0]
    assert dict(zip(cases, found.tolist(), strict=True)) == cases


@pytest.mark.parametrize("num_buckets, max_distance", [(8, 20), (32, 128), (64, 256)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_every_relative_bucket_is_used_once_and_in_order(num_buckets, max_distance, bidirectional):
    back = np.asarray(relative_bucket(-jnp.arange(2 * max_distance)[None], num_buckets, max_distance, bidirectional)[0])
    side = num_buckets // 2 if bidirectional else num_buckets
    assert (np.diff(back) >= 0).all() and set(back.tolist()) == set(range(side))
    assert back[max_distance] == side - 1


def test_relative_bias_is_the_tables_entry_of_the_bucket():
    config = small("encoder", position="relative", relative_buckets=8, relative_max_distance=20, num_layers=1)
    batch = example(config)
    model, params = build(config)
    assert params["encoder"]["relative_bias"]["table"].shape == (2, 8)
    zero = {**params, "encoder": {**params["encoder"], "relative_bias": {"table": jnp.zeros((2, 8))}}}

    def log_weights(p):
        state = model.apply({"params": p}, batch, mutable=["intermediates"])[1]
        return np.log(state["intermediates"]["encoder"]["layers_0"]["attention"]["weights"][0])

    # softmax(s + b) / softmax(s) is exp(b) up to a factor for each query
    difference = log_weights(params) - log_weights(zero)
    distance = np.arange(6)[None, :] - np.arange(6)[:, None]
    bias = np.asarray(params["encoder"]["relative_bias"]["table"])[
        :, relative_bucket(jnp.asarray(distance), 8, 20, True)
    ]
    np.testing.assert_allclose(
        difference - difference[..., :1], np.broadcast_to(bias - bias[..., :1], difference.shape), atol=1e-4
    )
