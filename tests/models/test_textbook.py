"""Layers and whole models against the textbook's formulas in plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.models.positions import sinusoidal
from tests.models.reference import (
    SMALL,
    allowed_loop,
    as_numpy,
    build,
    example,
    feed_forward,
    gelu,
    layer_norm,
    multi_head,
    post_norm_layer,
    pre_norm_layer,
    relu,
    rms_norm,
    small,
    softmax,
    tokens,
)

LENGTH = 6


def hidden(model, params, batch):
    return model.apply({"params": params}, batch, method=model.hidden)


def embed(params, ids, positions=None):
    positions = np.arange(len(ids)) if positions is None else positions
    return params["tokens"]["table"][ids] + params["positions"]["table"][positions]


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("norm_position", ["post", "pre"])
def test_encoder_is_the_textbooks_formula(norm_position, activation):
    config = small("encoder", norm_position=norm_position, activation=activation, final_norm=False, num_layers=3)
    batch = {"tokens": tokens((2, LENGTH)), "segments": jnp.array([[1, 1, 1, 1, 0, 0], [1] * 6])}
    model, params = build(config)
    found = hidden(model, params, batch)
    params = as_numpy(params)
    layer = post_norm_layer if norm_position == "post" else pre_norm_layer
    for row in range(2):
        real = np.asarray(batch["segments"][row]) == 1
        x = embed(params["embeddings"], batch["tokens"][row])
        for index in range(3):
            allowed = np.broadcast_to(real, (LENGTH, LENGTH))
            activate = {"gelu": gelu, "relu": relu}[activation]
            x = layer(x, params["encoder"][f"layers_{index}"], allowed, activate)
        np.testing.assert_allclose(found[row][real], x[real], atol=2e-5)


def test_bert_embeddings_add_token_types_and_normalize():
    config = small("encoder", num_token_types=2, embedding_norm=True, num_layers=1, norm_position="post")
    batch = {"tokens": tokens((1, LENGTH)), "token_types": jnp.array([[0, 0, 0, 1, 1, 1]])}
    model, params = build(config)
    found, without = hidden(model, params, batch), hidden(model, params, {"tokens": batch["tokens"]})
    params = as_numpy(params)
    for types, output in ((batch["token_types"][0], found), (np.zeros(LENGTH, int), without)):
        x = embed(params["embeddings"], batch["tokens"][0]) + params["embeddings"]["token_types"]["table"][types]
        x = layer_norm(x, params["embeddings"]["norm"])
        x = post_norm_layer(x, params["encoder"]["layers_0"], np.ones((LENGTH, LENGTH), bool))
        np.testing.assert_allclose(output[0], x, atol=2e-5)


def test_gpt3_alternates_dense_and_banded_layers():
    config = small(attention_windows=(0, 2), num_layers=4)
    batch = example(config)
    model, params = build(config)
    found = hidden(model, params, batch)
    params = as_numpy(params)
    for row in range(2):
        x = embed(params["embeddings"], batch["tokens"][row])
        for index in range(4):
            allowed = allowed_loop(LENGTH, causal=True, window=2 if index % 2 else 0)
            x = pre_norm_layer(x, params["decoder"][f"layers_{index}"], allowed)
        np.testing.assert_allclose(found[row], layer_norm(x, params["decoder"]["final_norm"]), atol=5e-5)


def test_prefix_is_seen_by_all_and_the_rest_causally():
    batch = {"tokens": tokens((1, LENGTH)), "prefix": jnp.array([[1, 1, 1, 0, 0, 0]])}
    model, params = build(small(num_layers=1, final_norm=False))
    found = hidden(model, params, batch)
    params = as_numpy(params)
    allowed = allowed_loop(LENGTH, causal=True, prefix=[1, 1, 1, 0, 0, 0])
    expected = pre_norm_layer(embed(params["embeddings"], batch["tokens"][0]), params["decoder"]["layers_0"], allowed)
    np.testing.assert_allclose(found[0], expected, atol=2e-5)


def test_original_encoder_decoder():
    """Vaswani et al. 2017: post-norm, sinusoids on scaled shared embeddings, cross-attention, tied output."""
    config = small(
        "encoder_decoder",
        norm_position="post",
        position="sinusoidal",
        scale_embeddings=True,
        activation="relu",
        num_layers=2,
        num_decoder_layers=1,
    )
    batch = example(config) | {"encoder_segments": jnp.array([[1, 1, 1, 1, 0, 0], [1] * 6])}
    model, params = build(config)
    logits = model.apply({"params": params}, batch)["lm_logits"]
    params = as_numpy(params)
    table = params["embeddings"]["tokens"]["table"]

    def embedded(ids):
        waves = np.asarray(sinusoidal(jnp.arange(len(ids))[None], SMALL["embed_dim"])[0])
        return table[ids] * np.sqrt(SMALL["embed_dim"]) + waves

    for row in range(2):
        real = np.asarray(batch["encoder_segments"][row]) == 1
        encoded = embedded(batch["encoder_tokens"][row])
        for index in range(2):
            everyone = np.broadcast_to(real, (6, 6))
            encoded = post_norm_layer(encoded, params["encoder"][f"layers_{index}"], everyone, relu)
        layer = params["decoder"]["layers_0"]
        x = embedded(batch["decoder_tokens"][row])
        x = layer_norm(x + multi_head(x, x, layer["attention"], allowed_loop(5, causal=True)), layer["attention_norm"])
        crossed = multi_head(x, encoded, layer["cross_attention"], np.broadcast_to(real, (5, 6)))
        x = layer_norm(x + crossed, layer["cross_attention_norm"])
        x = layer_norm(x + feed_forward(x, layer["mlp"], relu), layer["mlp_norm"])
        np.testing.assert_allclose(logits[row], x @ table.T, atol=1e-4)


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
def test_rmsnorm_and_gated_feed_forward_without_biases(activation):
    config = small(norm="rmsnorm", use_bias=False, activation=activation, num_layers=1, attention_scale="none")
    batch = {"tokens": tokens((1, LENGTH))}
    model, params = build(config)
    found = hidden(model, params, batch)[0]
    params = as_numpy(params)
    layer = params["decoder"]["layers_0"]
    assert all(path[-1].key != "bias" for path, _ in jax.tree_util.tree_leaves_with_path(params))
    x = embed(params["embeddings"], batch["tokens"][0])
    h = rms_norm(x, layer["attention_norm"])
    kernels = {name: child["kernel"] for name, child in layer["attention"].items()}
    outputs = []
    for head in range(2):
        query, key, value = (h @ kernels[name][:, head] for name in ("query", "key", "value"))
        scores = np.where(allowed_loop(LENGTH, causal=True), query @ key.T, -np.inf)  # unscaled, as in T5
        outputs.append(softmax(scores) @ value)
    x = x + np.concatenate(outputs, -1) @ kernels["out"].reshape(-1, SMALL["embed_dim"])
    h = rms_norm(x, layer["mlp_norm"])
    gate = h @ layer["mlp"]["gate"]["kernel"]
    if activation == "swiglu":
        gate = gate / (1 + np.exp(-gate))
    else:  # the tanh form, which T5 v1.1 uses
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    x = x + (gate * (h @ layer["mlp"]["in"]["kernel"])) @ layer["mlp"]["out"]["kernel"]
    np.testing.assert_allclose(found, rms_norm(x, params["decoder"]["final_norm"]), atol=2e-5)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_query_is_multi_head_with_repeated_kernels(kv_heads):
    grouped_config = small(num_heads=4, num_kv_heads=kv_heads, position="rotary")
    batch = example(grouped_config)
    grouped, params = build(grouped_config)
    multi, shapes = build(small(num_heads=4, position="rotary"))

    def repeated(path, leaf):
        names = [part.key for part in path]
        axis = {"kernel": 1, "bias": 0}.get(names[-1])
        return jnp.repeat(leaf, 4 // kv_heads, axis) if names[-2] in ("key", "value") else leaf

    wide = jax.tree_util.tree_map_with_path(repeated, params)
    assert jax.tree.map(jnp.shape, wide) == jax.tree.map(jnp.shape, shapes)
    assert jax.tree.map(jnp.shape, wide) != jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(hidden(grouped, params, batch), hidden(multi, wide, batch), atol=1e-5)
