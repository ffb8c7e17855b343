import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.errors import LmxError
from lmx.generation.sampling import (
    Sampling,
    choose,
    filtered_logits,
    keep_top_k,
    keep_top_p,
    likeliest,
    make_sampling,
)

PROBABILITIES = np.array([0.1, 0.4, 0.2, 0.3], np.float32)


def kept(logits):
    return np.isfinite(np.asarray(logits)).tolist()


def test_top_k_keeps_the_k_highest_of_each_row():
    logits = jnp.array([[1.0, 4.0, 2.0, 3.0], [9.0, -1.0, 0.0, -2.0]])
    assert kept(keep_top_k(logits, 2)) == [[False, True, False, True], [True, False, True, False]]
    assert keep_top_k(logits, 2)[0, 1] == 4.0
    assert kept(keep_top_k(logits, 100)) == [[True] * 4] * 2


@pytest.mark.parametrize(
    "p, expected",
    [
        (0.01, [False, True, False, False]),
        (0.39, [False, True, False, False]),
        (0.41, [False, True, False, True]),
        (0.69, [False, True, False, True]),
        (0.71, [False, True, True, True]),
        (0.95, [True, True, True, True]),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_hold_p(p, expected):
    assert kept(keep_top_p(jnp.log(PROBABILITIES)[None], p)) == [expected]


def test_top_p_is_measured_on_what_top_k_left():
    # Of 0.4, 0.3, 0.2 the first two hold 7/9 = 0.78, which is enough for 0.75; of all four they hold only 0.7.
    logits = jnp.log(PROBABILITIES)[None]
    assert kept(filtered_logits(logits, Sampling(1.0, 3, 0.75))) == [[False, True, False, True]]
    assert kept(filtered_logits(logits, Sampling(1.0, 0, 0.75))) == [[False, True, True, True]]


def test_temperature_divides_before_the_filters():
    logits = jnp.array([[0.0, 2.0]])
    np.testing.assert_allclose(filtered_logits(logits, Sampling(0.5)), [[0.0, 4.0]])
    # softmax([0, 1]) has 0.73 on its second token, softmax([0, 2]) has 0.88.
    assert kept(filtered_logits(logits, Sampling(2.0, 0, 0.8))) == [[True, True]]
    assert kept(filtered_logits(logits, Sampling(1.0, 0, 0.8))) == [[False, True]]


def test_greedy_takes_the_likeliest_and_needs_no_key():
    assert choose(jnp.array([[1.0, 3.0, 2.0], [5.0, 3.0, 2.0]]), make_sampling(0.0), None).tolist() == [1, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_likeliest_is_the_first_of_the_largest(dtype):
    logits = jax.random.normal(jax.random.key(0), (20, 1000)).round().astype(dtype)  # so that there are several
    logits = logits.at[0].set(-jnp.inf).at[1, 7:].set(-jnp.inf)
    assert (np.asarray(logits) == np.asarray(logits.max(-1, keepdims=True))).sum() > 1050
    np.testing.assert_array_equal(likeliest(logits), np.argmax(np.asarray(logits, np.float32), axis=-1))
    assert likeliest(jnp.full((1, 5), jnp.nan, dtype)) == 0


def test_frequencies_are_those_of_the_filtered_distribution():
    draws = 20_000
    rngs = jax.random.split(jax.random.key(0), draws)
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES), (draws, 4))
    tokens = choose(logits, make_sampling(1.0, top_k=3), rngs)
    frequencies = np.bincount(tokens, minlength=4) / draws
    assert frequencies[0] == 0
    np.testing.assert_allclose(frequencies[1:], PROBABILITIES[1:] / 0.9, atol=0.015)  # 4 standard errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"temperature": -0.1}, "temperature must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must be"),
        ({"top_p": 1.1}, "top_p must be"),
    ],
)
def test_numbers_out_of_range_are_named(arguments, message):
    with pytest.raises(LmxError, match=message):
        make_sampling(**arguments)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_without_a_token_are_never_chosen(temperature):
    logits = jnp.zeros((64, 8)).at[:, 5:].set(9.0)
    sampling = make_sampling(temperature, vocab_size=5)
    chosen = choose(logits, sampling, jax.random.split(jax.random.key(0), 64))
    assert int(chosen.max()) < 5 and (temperature == 0 or len(np.unique(chosen)) > 2)
