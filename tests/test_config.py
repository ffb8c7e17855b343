"""The schema: round trips, errors that name what was meant, and fields that must agree."""

import json

import pytest

from lmx.config import (
    Config,
    Experts,
    Model,
    config_dict,
    differences,
    field_types,
    from_config_dict,
    from_dict,
    layer_period,
    to_dict,
)
from lmx.errors import ConfigError

UNUSUAL = {
    "model": {"num_layers": 4, "attention_windows": [0, 128], "experts": {"num_experts": 8}, "num_kv_heads": 3},
    "objective": {"mask_split": [1, 0, 0]},
    "data": {"labels": ["no", "yes"]},
    "optimizer": {"learning_rate": 1, "decay_steps": 70},
    "seed": 7,
}


def test_defaults_and_unusual_values_survive_json_and_config_dict():
    for config in (Config(), from_dict(UNUSUAL)):
        assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
        assert from_config_dict(config_dict(config)) == config
        assert from_config_dict(config) is config
    assert from_dict(UNUSUAL) != Config()


def test_values_take_the_fields_type():
    config = from_dict(UNUSUAL)
    assert config.model.attention_windows == (0, 128)
    assert config.objective.mask_split == (1.0, 0.0, 0.0) and type(config.objective.mask_split[0]) is float
    assert config.optimizer.learning_rate == 1.0 and type(config.optimizer.learning_rate) is float
    assert config.model.head_dim is None and config.optimizer.decay_steps == 70


def test_config_dict_is_locked_and_its_holes_take_a_value_of_their_type():
    values = config_dict(Config())
    with pytest.raises(AttributeError):
        values.model.num_layer = 3
    with pytest.raises(TypeError):
        values.model.vocab_size = "many"
    values.model.vocab_size = 50
    values.train.steps = 1500
    config = from_config_dict(values)
    assert (config.model.vocab_size, config.train.steps) == (50, 1500)


def test_replace_changes_leaves_and_checks_again():
    config = Config().replace(train={"steps": 300}, model={"experts": {"num_experts": 4}}, seed=3)
    assert (config.train.steps, config.model.experts.num_experts, config.seed) == (300, 4, 3)
    assert config.train.log_every == Config().train.log_every
    assert config.model.experts.capacity_factor == Config().model.experts.capacity_factor
    assert Config().train.steps == 1000
    with pytest.raises(ConfigError, match="train.steps must be at least 1, not 0"):
        config.replace(train={"steps": 0})


@pytest.mark.parametrize(
    "values, message",
    [
        ({"modle": {}}, "no field 'modle'; did you mean 'model'"),
        ({"model": {"num_layer": 3}}, "no field 'model.num_layer'; did you mean 'model.num_layers'"),
        ({"model": {"experts": {"nun_experts": 3}}}, "did you mean 'model.experts.num_experts'"),
        ({"optimizer": {"steps": 3}}, "no field 'optimizer.steps'; did you mean 'train.steps'"),
        ({"num_heads": 3}, "no field 'num_heads'; did you mean 'model.num_heads'"),
        ({"model": 3}, "model is a section with fields of its own, not 3"),
        ({"model": {"norm": "layrnorm"}}, "one of layernorm, rmsnorm, not 'layrnorm'; did you mean 'layernorm'"),
        ({"model": {"heads": ["lm", "mml"]}}, "model.heads must be one of .* not 'mml'; did you mean 'mlm'"),
        ({"model": {"num_layers": 3.0}}, r"model.num_layers must be int, not 3.0 \(float\)"),
        ({"model": {"num_layers": True}}, r"model.num_layers must be int, not True \(bool\)"),
        ({"model": {"num_layers": None}}, "model.num_layers must be int, not None"),
        ({"model": {"use_bias": 1}}, r"model.use_bias must be bool, not 1 \(int\)"),
        ({"model": {"vocab_size": "many"}}, "model.vocab_size must be int, not 'many'"),
        ({"model": {"attention_windows": 128}}, "model.attention_windows must be a tuple of int, not 128"),
        ({"model": {"attention_windows": [0, "wide"]}}, "model.attention_windows must be a tuple of int"),
        ({"model": {"heads": "lm"}}, "model.heads must be a tuple of str, not 'lm'"),
        ({"optimizer": {"learning_rate": "3e-4"}}, "optimizer.learning_rate must be float, not '3e-4'"),
        ({"optimizer": {"learning_rate": -1}}, "optimizer.learning_rate must be at least 0, not -1.0"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate must be at least 0, not nan"),
        ({"model": {"dropout": 1.5}}, "model.dropout must be between 0 and 1, not 1.5"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
    ],
)
def test_errors_of_single_fields(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(values)


def test_a_section_of_the_wrong_kind_is_named():
    with pytest.raises(ConfigError, match="model must be a Model section"):
        Config(model=Experts())


ENCODER = {"architecture": "encoder", "heads": ["mlm", "classification"]}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model": {"embed_dim": 100}}, r"embed_dim \(100\) is not divisible by model.num_heads \(12\)"),
        ({"model": {"num_kv_heads": 5}}, r"num_heads \(12\) is not a multiple of model.num_kv_heads \(5\)"),
        ({"model": {"position": "rotary", "head_dim": 7}}, "width of a head must be even, not 7"),
        (
            {"model": {"position": "sinusoidal", "embed_dim": 9, "num_heads": 3}},
            "sinusoidal positions need an even model.embed_dim, not 9",
        ),
        ({"model": {"position": "relative", "relative_buckets": 3}}, "relative_buckets must be even and at least 4"),
        (
            {"model": {"position": "relative", "relative_max_distance": 16}},
            r"relative_max_distance \(16\) must be more than half of model.relative_buckets \(32\)",
        ),
        ({"model": {"attention_windows": []}}, "attention_windows is empty"),
        ({"model": {"attention_windows": [0, -2]}}, "holds a negative window"),
        ({"model": {"attention_windows": [0, 1, 2, 3, 4]}}, r"num_layers \(12\) is not a multiple of 5"),
        (
            {"model": {"num_layers": 9, "attention_windows": [0, 1, 2], "experts": {"num_experts": 2}}},
            r"num_layers \(9\) is not a multiple of 6",
        ),
        (
            {
                "model": {"architecture": "encoder_decoder", "num_decoder_layers": 3, "experts": {"num_experts": 2}},
                "objective": {"name": "seq2seq"},
            },
            r"num_decoder_layers \(3\) is not a multiple of 2",
        ),
        ({"objective": {"mask_split": [0.5, 0.5]}}, "mask_split must be three parts that sum to 1"),
        ({"objective": {"mask_split": [0.5, 0.5, 0.5]}}, "mask_split must be three parts that sum to 1"),
        ({"objective": {"mask_split": [1.5, -0.5, 0]}}, "mask_split must be three parts that sum to 1"),
        ({"objective": {"name": "mlm"}}, "'mlm' needs model.architecture='encoder', not 'decoder'"),
        ({"objective": {"name": "seq2seq"}}, "'seq2seq' needs model.architecture='encoder_decoder', not 'decoder'"),
        (
            {"objective": {"name": "span_corruption"}, "model": {"architecture": "encoder"}},
            "'span_corruption' needs model.architecture='encoder_decoder'",
        ),
        ({"objective": {"name": "prefix_lm"}, "model": {"architecture": "encoder"}}, "architecture='decoder'"),
        ({"model": {"heads": ["classification"]}}, "'causal' needs 'lm' in model.heads"),
        ({"objective": {"name": "mlm"}, "model": {"architecture": "encoder"}}, "needs 'mlm' in model.heads"),
        (
            {"objective": {"name": "mlm", "next_sentence": True}, "model": ENCODER},
            "num_token_types=2; found .* 2 and 0",
        ),
        (
            {"objective": {"name": "classification", "task": "regression"}, "model": ENCODER},
            "regression needs model.num_classes=1, not 2",
        ),
        (
            {"objective": {"name": "classification"}, "model": {"heads": ["classification"]}},
            "a decoder's first token sees no other: set model.pooling='last' or 'mean'",
        ),
        ({"data": {"length": 2048}}, r"data.length \(2048\) is more than model.max_length \(1024\)"),
        ({"mesh": {"fsdp": -1}}, "only one axis of config.mesh may be -1"),
        ({"mesh": {"tensor": 0}}, "an axis of config.mesh is 0"),
    ],
)
def test_errors_of_fields_that_do_not_agree(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(values)


@pytest.mark.parametrize(
    "values",
    [
        {"model": {"embed_dim": 100, "head_dim": 8}},
        {"model": {"num_layers": 9, "attention_windows": [0, 1], "scan_layers": False}},
        {"model": {"position": "rotary"}, "data": {"length": 2048}},
        {"model": {"relative_buckets": 3}},
        {"objective": {"name": "classification"}, "model": {"heads": ["classification"], "pooling": "mean"}},
        {"mesh": {"data": 1, "fsdp": -1}},
    ],
)
def test_neighbours_of_those_errors_are_allowed(values):
    from_dict(values)


@pytest.mark.parametrize(
    "windows, experts, period",
    [((0,), 0, 1), ((0, 128), 0, 2), ((0,), 8, 2), ((0, 128), 8, 2), ((0, 4, 8), 8, 6)],
)
def test_layer_period(windows, experts, period):
    assert layer_period(Model(attention_windows=windows, experts=Experts(num_experts=experts, every=2))) == period


def test_every_field_says_what_it_means():
    fields = field_types()
    assert {"model.experts.num_experts", "train.global_batch_size", "seed"} <= set(fields)
    for name, field in fields.items():
        assert field.metadata["meaning"].endswith("."), name


def test_differences_are_named_by_their_dotted_path():
    changed = Config().replace(model={"experts": {"num_experts": 2}}, seed=1)
    found = differences(to_dict(Config()), to_dict(changed))
    assert found == {"model.experts.num_experts": (0, 2), "seed": (0, 1)}
    assert differences({"a": 1}, {}) == {"a": (1, None)}
