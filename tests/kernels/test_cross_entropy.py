import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.kernels import cross_entropy as module
from lmx.kernels.cross_entropy import cross_entropy, cross_entropy_reference, scores


def test_a_value_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]])) + 7.0
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([1])), [np.log(4)], rtol=1e-6)
    smoothed = 0.7 * np.log(4) + 0.3 * (np.log(2) + 2 * np.log(4)) / 3
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([1]), label_smoothing=0.3), [smoothed], rtol=1e-6)
    with_z = np.log(4) + 0.1 * 7.0**2
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([1]), z_loss=0.1), [with_z], rtol=1e-6)


@pytest.mark.parametrize("form", ["cpu", "gpu", "reference"])
@pytest.mark.parametrize("examples", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_loss_and_gradient_are_those_of_the_definition_in_float64(form, examples, monkeypatch):
    monkeypatch.setattr(module, "current_platform", lambda: form)
    function = cross_entropy_reference if form == "reference" else cross_entropy

    @settings(max_examples=examples, deadline=None)
    @given(st.integers(0, 99), st.integers(1, 4), st.integers(1, 9), st.integers(1, 40), st.booleans(), st.booleans())
    def check(seed, batch, length, vocab, smoothed, with_z):
        label_smoothing, z_loss = 0.1 * smoothed, 0.01 * with_z
        rng = np.random.default_rng(seed)
        logits = jnp.asarray(4 * rng.standard_normal((batch, length, vocab)), jnp.float32)
        targets, weights = rng.integers(vocab, size=(batch, length)), rng.standard_normal((batch, length))

        def total(x):
            nll = function(x, jnp.asarray(targets), label_smoothing, z_loss)
            return jnp.sum(jnp.asarray(weights, jnp.float32) * nll), nll

        gradient, nll = jax.grad(total, has_aux=True)(logits)
        log_z = np.log(np.exp(np.float64(logits)).sum(-1, keepdims=True))
        wanted = (1 - label_smoothing) * np.eye(vocab)[targets] + label_smoothing / vocab
        expected = -(wanted * (logits - log_z)).sum(-1) + z_loss * log_z[..., 0] ** 2
        by_logits = np.exp(logits - log_z) * (1 + 2 * z_loss * log_z) - wanted
        np.testing.assert_allclose(nll, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(gradient, by_logits * weights[..., None], rtol=1e-4, atol=1e-5)

    check()


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_target_is_right_where_no_id_is_likelier_and_not_all_are_equal(platform, monkeypatch):
    monkeypatch.setattr(module, "current_platform", lambda: platform)
    logits = jnp.array([[1.0, 3.0, 2.0, 9.0], [3.0, 3.0, 2.0, 9.0], [0.7, 0.7, 0.7, 9.0]])  # the fourth is of no id
    found = [scores(logits, jnp.full(3, target), 0.0, 0.0, vocab_size=3)[1].tolist() for target in range(3)]
    assert found == [[False, True, False], [True, True, False], [False, False, False]]


def test_large_logits_stay_finite_where_the_definition_overflows():
    logits = jnp.array([[1000.0, 990.0]])
    assert not np.isfinite(cross_entropy_reference(logits, jnp.array([1]))).all()
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([1])), [10.0 + np.log1p(np.exp(-10))], rtol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
    logits = jnp.zeros((1, 1000), jnp.bfloat16)
    loss = cross_entropy(logits, jnp.array([3]))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, [np.log(1000)], rtol=1e-6)


def test_an_excluded_token_costs_nothing():
    logits = jnp.array([[0.0, 0.0, -jnp.inf]])
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([0])), [np.log(2)], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: cross_entropy(x, jnp.array([0])).sum())(logits)).all()
