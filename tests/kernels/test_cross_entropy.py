import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.kernels import cross_entropy as module
from lmx.kernels.cross_entropy import cross_entropy, cross_entropy_reference, scores

KEY = jax.random.key(0)
LOGITS = 3 * jax.random.normal(KEY, (2, 5, 11))
TARGETS = jax.random.randint(KEY, (2, 5), 0, 11)


def test_a_value_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]])) + 7.0
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([1])), [np.log(4)], rtol=1e-6)
    smoothed = 0.7 * np.log(4) + 0.3 * (np.log(2) + 2 * np.log(4)) / 3
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([1]), label_smoothing=0.3), [smoothed], rtol=1e-6)
    with_z = np.log(4) + 0.1 * 7.0**2
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([1]), z_loss=0.1), [with_z], rtol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_loss_and_gradient_match_the_reference(label_smoothing, z_loss, platform, monkeypatch):
    monkeypatch.setattr(module, "current_platform", lambda: platform)

    def total(function):
        return lambda logits: jnp.sum(
            jnp.sin(jnp.arange(10.0).reshape(2, 5)) * function(logits, TARGETS, label_smoothing, z_loss)
        )

    np.testing.assert_allclose(
        cross_entropy(LOGITS, TARGETS, label_smoothing, z_loss),
        cross_entropy_reference(LOGITS, TARGETS, label_smoothing, z_loss),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        jax.grad(total(cross_entropy))(LOGITS), jax.grad(total(cross_entropy_reference))(LOGITS), rtol=1e-4, atol=1e-6
    )


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
