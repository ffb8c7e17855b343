"""Heads on random hidden states, against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.reference import as_numpy, build, example, gelu, layer_norm, small

SEGMENTS = jnp.array([[1, 1, 1, 0, 0, 0], [1] * 6])


def states(seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((2, 6, 8)), jnp.float32)


def call(config, name, *arguments):
    model, params = build(config)
    found = model.apply({"params": params}, *arguments, method=getattr(model, name))
    return np.asarray(found), as_numpy(params)


@pytest.mark.parametrize("scale_logits", [False, True])
def test_tied_language_model_head_is_the_transposed_table(scale_logits):
    hidden = states()
    found, params = call(small(scale_logits=scale_logits), "lm_logits", hidden)
    factor = 8**-0.5 if scale_logits else 1.0
    np.testing.assert_allclose(found, factor * hidden @ params["embeddings"]["tokens"]["table"].T, atol=1e-5)
    assert "heads" not in params


def test_untied_head_has_a_kernel_of_its_own():
    hidden = states()
    found, params = call(small(tie_embeddings=False), "lm_logits", hidden)
    np.testing.assert_allclose(found, hidden @ params["heads"]["lm"]["output"]["kernel"], atol=1e-5)


def test_heads_take_single_positions():
    found, params = call(small(), "lm_logits", states()[:, 0])
    np.testing.assert_allclose(found, states()[:, 0] @ params["embeddings"]["tokens"]["table"].T, atol=1e-5)


def test_masked_language_model_head_is_berts():
    found, params = call(small("encoder", heads=("mlm",)), "mlm_logits", states())
    head = params["heads"]["mlm"]
    h = layer_norm(gelu(np.asarray(states()) @ head["dense"]["kernel"] + head["dense"]["bias"]), head["norm"])
    expected = h @ params["embeddings"]["tokens"]["table"].T + head["vocabulary"]["bias"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["first", "mean", "last"])
def test_classification_pools_without_padding(pooling):
    config = small("encoder", heads=("classification",), num_classes=3, pooling=pooling)
    batch = example(config) | {"segments": SEGMENTS}
    found, params = call(config, "classify", states(), batch)
    head = params["heads"]["classification"]
    hidden = np.asarray(states(), np.float64)
    pooled = {
        "first": hidden[:, 0],
        "mean": np.stack([hidden[0, :3].mean(0), hidden[1].mean(0)]),
        "last": np.stack([hidden[0, 2], hidden[1, -1]]),
    }[pooling]
    dense = head["pooler"]["dense"]
    pooled = np.tanh(pooled @ dense["kernel"] + dense["bias"])
    np.testing.assert_allclose(found, pooled @ head["output"]["kernel"] + head["output"]["bias"], atol=1e-5)


def test_span_scores_put_padding_out_of_reach():
    config = small("encoder", heads=("span",))
    found, params = call(config, "span_logits", states(), example(config) | {"segments": SEGMENTS})
    head = params["heads"]["span"]
    real = np.asarray(SEGMENTS) > 0
    expected = np.asarray(states()) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(found[real], expected[real], atol=1e-5)
    assert (found[~real] == np.finfo(np.float32).min).all()


def test_every_configured_head_is_in_the_outputs_and_apart_from_the_body():
    config = small("encoder", heads=("mlm", "classification", "span"))
    model, params = build(config)
    outputs = model.apply({"params": params}, example(config))
    assert set(outputs) == {"hidden", "mlm_logits", "classification_logits", "span_logits"}
    assert set(params) == {"embeddings", "encoder", "heads"}
    assert set(params["heads"]) == {"mlm", "classification", "span"}
