"""Initial values, axis names, types, dropout and what a model shows of its inside."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.config import Experts
from lmx.errors import ConfigError
from lmx.models.feed_forward import FeedForward, relu
from lmx.models.transformer import Transformer
from tests.models.reference import build, example, small

EVERYTHING = small(
    "encoder_decoder",
    num_token_types=2,
    embedding_norm=True,
    experts=Experts(num_experts=3, every=2),
    heads=("lm", "mlm", "classification", "span"),
    tie_embeddings=False,
    activation="swiglu",
)
KINDS = {
    "everything": EVERYTHING,
    "everything scanned": dataclasses.replace(EVERYTHING, scan_layers=True),
    "relative": small("encoder", position="relative", heads=("mlm",)),
    "grouped": small("decoder", num_heads=4, num_kv_heads=2, scan_layers=True),
}


def initialized(config, seed=0):
    return Transformer(config).init(jax.random.key(seed), example(config))["params"]


def boxed_shapes(config):
    return jax.eval_shape(lambda: initialized(config))


def wide(**fields):
    sizes = {"embed_dim": 96, "num_heads": 4, "mlp_dim": 160, "vocab_size": 500, "num_layers": 2}
    return small(**{**sizes, **fields})


def stddev(leaf):
    return float(np.asarray(leaf).std())


def test_normal_initializer_has_the_stddev_asked_for():
    params = nn.meta.unbox(initialized(wide(init_stddev=0.05, embedding_stddev=0.3)))
    layer = params["decoder"]["layers_0"]
    for kernel in (*(layer["attention"][n]["kernel"] for n in ("query", "key", "out")), layer["mlp"]["in"]["kernel"]):
        np.testing.assert_allclose(stddev(kernel), 0.05, rtol=0.05)
    np.testing.assert_allclose(stddev(params["embeddings"]["tokens"]["table"]), 0.3, rtol=0.05)
    np.testing.assert_array_equal(layer["mlp"]["in"]["bias"], 0.0)
    np.testing.assert_array_equal(layer["mlp_norm"]["scale"], 1.0)


def test_gpt2_scales_what_writes_to_the_residual_stream_and_nothing_else():
    params = nn.meta.unbox(initialized(wide(init_stddev=0.02, scale_residual_init=True)))["decoder"]["layers_1"]
    smaller = 0.02 / math.sqrt(2 * 2)
    np.testing.assert_allclose(stddev(params["attention"]["out"]["kernel"]), smaller, rtol=0.05)
    np.testing.assert_allclose(stddev(params["mlp"]["out"]["kernel"]), smaller, rtol=0.05)
    np.testing.assert_allclose(stddev(params["attention"]["value"]["kernel"]), 0.02, rtol=0.05)
    np.testing.assert_allclose(stddev(params["mlp"]["in"]["kernel"]), 0.02, rtol=0.05)


def test_t5_fan_in_initializer_with_the_scale_of_attention_in_the_query():
    config = wide(initializer="fan_in", attention_scale="none", head_dim=16, init_scale=0.25)
    layer = nn.meta.unbox(initialized(config))["decoder"]["layers_0"]
    expected = {
        ("attention", "query"): 0.5 * (96 * 16) ** -0.5,
        ("attention", "key"): 0.5 * 96**-0.5,
        ("attention", "out"): 0.5 * (4 * 16) ** -0.5,
        ("mlp", "in"): 0.5 * 96**-0.5,
        ("mlp", "out"): 0.5 * 160**-0.5,
    }
    for (part, name), value in expected.items():
        np.testing.assert_allclose(stddev(layer[part][name]["kernel"]), value, rtol=0.05)


def test_xavier_initializer_is_uniform_over_fan_in_and_fan_out():
    layer = nn.meta.unbox(initialized(wide(initializer="xavier")))["decoder"]["layers_0"]
    kernel = np.asarray(layer["mlp"]["in"]["kernel"])
    limit = math.sqrt(6 / (96 + 160))
    assert 0.98 * limit < np.abs(kernel).max() <= limit
    np.testing.assert_allclose(kernel.std(), limit / math.sqrt(3), rtol=0.05)
    np.testing.assert_allclose(stddev(layer["attention"]["query"]["kernel"]), math.sqrt(2 / (96 + 96)), rtol=0.05)


def test_experts_start_apart_with_the_stddev_of_one_expert():
    config = wide(initializer="fan_in", experts=Experts(num_experts=4, every=2))
    experts = nn.meta.unbox(initialized(config))["decoder"]["layers_1"]["experts"]
    np.testing.assert_allclose(stddev(experts["in"]["kernel"]), 96**-0.5, rtol=0.05)
    assert not np.allclose(experts["in"]["kernel"][0], experts["in"]["kernel"][1])


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_is_float32_and_names_each_of_its_axes(name):
    leaves = jax.tree_util.tree_leaves_with_path(boxed_shapes(KINDS[name]), is_leaf=lambda x: hasattr(x, "names"))
    for path, leaf in leaves:
        place = jax.tree_util.keystr(path)
        assert isinstance(leaf, nn.LogicallyPartitioned), place
        assert len(leaf.names) == leaf.value.ndim and leaf.value.dtype == jnp.float32, place
        assert any(leaf.names) or leaf.value.ndim == 1, place  # the few outputs of a classifier have none
        assert (leaf.names[0] == "layers") == ("['layers']" in place), place


def test_axis_names_of_the_large_parameters():
    params = boxed_shapes(EVERYTHING)
    layer = params["decoder"]["layers_0"]
    assert params["embeddings"]["tokens"]["table"].names == ("vocab", "embed")
    assert layer["attention"]["query"]["kernel"].names == ("embed", "heads", "head_dim")
    assert layer["attention"]["key"]["kernel"].names == ("embed", "kv_heads", "head_dim")
    assert layer["attention"]["out"]["kernel"].names == ("heads", "head_dim", "embed")
    assert layer["mlp"]["in"]["kernel"].names == ("embed", "mlp")
    assert layer["mlp"]["out"]["kernel"].names == ("mlp", "embed")
    sparse = params["decoder"]["layers_1"]["experts"]
    assert sparse["in"]["kernel"].names == ("experts", "embed", "mlp")
    assert sparse["out"]["kernel"].names == ("experts", "mlp", "embed")
    assert sparse["router"]["kernel"].names == ("embed", "experts")
    assert params["heads"]["lm"]["output"]["kernel"].names == ("embed", "vocab")


@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_computes_with_float32_parameters_and_logits(name):
    config = dataclasses.replace(KINDS[name], dtype="bfloat16")
    batch = example(config)
    model, params = build(config)
    outputs = jax.jit(model.apply)({"params": params}, batch)
    assert outputs["hidden"].dtype == jnp.bfloat16
    assert all(value.dtype == jnp.float32 for key, value in outputs.items() if key != "hidden")
    exact, _ = build(KINDS[name])
    expected = jax.jit(exact.apply)({"params": params}, batch)["hidden"]
    assert 0 < np.abs(np.asarray(outputs["hidden"], np.float32) - expected).max() < 0.2


@pytest.mark.parametrize("field", ["dropout", "attention_dropout", "mlp_dropout", "final_dropout", "head_dropout"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_dropout_acts_only_in_training(field, scan_layers):
    config = small("encoder", heads=("classification",), scan_layers=scan_layers, **{field: 0.5})
    batch = example(config)
    model, params = build(config)
    plain, _ = build(dataclasses.replace(config, **{field: 0.0}))

    def logits(model, train, seed=0):
        rngs = {"dropout": jax.random.key(seed)}
        return np.asarray(model.apply({"params": params}, batch, train, rngs=rngs)["classification_logits"])

    np.testing.assert_array_equal(logits(model, False), logits(plain, False))
    assert not np.allclose(logits(model, True, 0), logits(plain, True))
    assert not np.allclose(logits(model, True, 0), logits(model, True, 1))
    np.testing.assert_array_equal(logits(model, True, 1), logits(model, True, 1))


@pytest.mark.parametrize(("activation", "arrays"), [("relu", 1), ("gelu", 2), ("swiglu", 3)])
def test_what_backward_keeps_of_a_hidden_layer(activation, arrays):
    """What the function was given and what it gave; of relu the latter alone."""
    config = small("decoder", activation=activation)
    layer, x = FeedForward(config), jnp.ones((2, 5, config.embed_dim))
    params = layer.init(jax.random.key(0), x)
    jaxpr = jax.make_jaxpr(lambda x: jax.vjp(lambda x: layer.apply(params, x), x)[1])(x)
    assert len({kept for kept in jaxpr.jaxpr.outvars if kept.aval.shape == (2, 5, config.mlp_dim)}) == arrays


def test_relu_has_the_gradient_of_its_definition():
    x = jnp.array([-2.0, -0.0, 0.0, 0.5, 3.0])
    y, back = jax.vjp(relu, x)
    np.testing.assert_array_equal(y, [0, 0, 0, 0.5, 3])
    np.testing.assert_array_equal(back(jnp.full(5, 2.0))[0], [0, 0, 0, 2, 2])


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_intermediates_on_request(scan_layers, remat):
    config = small("encoder_decoder", num_layers=2, scan_layers=scan_layers, remat=remat, num_decoder_layers=4)
    batch = example(config)
    model, params = build(config)
    outputs, state = model.apply({"params": params}, batch, mutable=["intermediates"])
    found = jax.tree_util.tree_leaves_with_path(state["intermediates"])
    weights = [leaf for path, leaf in found if "weights" in jax.tree_util.keystr(path)]
    assert sum(leaf.shape[0] if scan_layers else 1 for leaf in weights) == 2 + 4 + 4  # self, self and cross
    for leaf in weights:
        np.testing.assert_allclose(leaf.sum(-1), 1.0, atol=1e-5)
    residuals = [leaf for path, leaf in found if "mlp_residual" in jax.tree_util.keystr(path)]
    assert sum(leaf.shape[0] if scan_layers else 1 for leaf in residuals) == 2 + 4
    np.testing.assert_array_equal(state["intermediates"]["decoder"]["output"][0], outputs["hidden"])
    bare = model.apply({"params": params}, batch)
    assert set(bare) == {"hidden", "lm_logits"}  # no second result without the request
    np.testing.assert_allclose(bare["hidden"], outputs["hidden"], atol=1e-6)


def test_init_makes_no_intermediates():
    config = small()
    assert set(Transformer(config).init(jax.random.key(0), example(config))) == {"params"}


def test_a_row_longer_than_the_learned_table_is_an_error():
    config = small(max_length=4)
    model, params = build(config, batch={"tokens": jnp.ones((1, 4), jnp.int32)})
    with pytest.raises(ConfigError, match=r"6 tokens does not fit model.max_length \(4\)"):
        model.apply({"params": params}, example(config))
