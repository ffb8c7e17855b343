"""Every shipped config: it is read and checked, has the parameters that its paper counts, and takes a step, shrunk."""

import dataclasses
import importlib.util
import json
import math
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.config import Config, from_config_dict, from_dict, layer_period, to_dict
from lmx.config_files import describe_file, read_config_file
from lmx.errors import ConfigError
from lmx.models.heads import num_params
from lmx.models.transformer import Transformer
from lmx.objectives import make_objective
from lmx.text.corpora import open_source
from lmx.text.pipeline import make_batches
from lmx.text.tokenizers import ByteTokenizer
from lmx.training.experiment import record_fields

FOLDER = Path(__file__).parents[2] / "experiments"


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = {path.stem: load(path) for path in sorted(FOLDER.glob("*.py"))}
VARIANTS = {
    name: list(next(getattr(module, table) for table in ("VARIANTS", "SIZES", "STEPS") if hasattr(module, table)))
    for name, module in MODULES.items()
}
ALL = [(name, variant) for name, variants in VARIANTS.items() for variant in variants]


def get(name: str, variant: str) -> Config:
    return from_config_dict(MODULES[name].get_config(variant))


def test_every_system_is_there():
    systems = {"bert", "gpt2", "gpt3", "t5", "switch", "transformer_wmt", "shakespeare_char", "classify", "seq2seq"}
    assert systems | {"quickstart", "mlm", "prefix_lm"} <= set(MODULES)


@pytest.mark.parametrize("name, variant", ALL)
def test_config_is_locked_and_survives_a_round_trip(name, variant):
    values = MODULES[name].get_config(variant)
    assert values.is_locked
    config = from_config_dict(values)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    read = read_config_file(f"{FOLDER / name}.py:{variant}", ["--config.seed=5", "--config.train.steps=1234567"])
    assert read == config.replace(seed=5, train={"steps": 1234567})


@pytest.mark.parametrize("name", MODULES)
def test_default_variant_is_one_of_the_named(name):
    default = from_config_dict(MODULES[name].get_config())
    assert default in [get(name, variant) for variant in VARIANTS[name]]


@pytest.mark.parametrize("name", MODULES)
def test_tiny_variant_needs_no_download(name):
    config = get(name, "tiny")
    for source in (config.data.train, config.data.eval):
        assert "tfds:" not in source
    assert config.train.steps <= 1000 and config.model.dtype == "float32"


@pytest.mark.parametrize("name", MODULES)
def test_unknown_variant_names_the_nearest(name):
    wrong = VARIANTS[name][0] + "x"
    with pytest.raises(ConfigError, match=re.escape(f"{name} has no variant {wrong!r}; did you mean")):
        MODULES[name].get_config(wrong)
    with pytest.raises(ConfigError, match="did you mean"):
        read_config_file(f"{FOLDER / name}.py:{wrong}")


@pytest.mark.parametrize("name", MODULES)
def test_lab_note_tells_of_every_variant(name):
    note = describe_file(str(FOLDER / f"{name}.py"))
    for variant in VARIANTS[name]:
        pattern = r"base_8 … base_256" if variant.startswith("base_") else rf"(?<![\w.]){re.escape(variant)}\b"
        assert re.search(pattern, note), variant


@pytest.mark.parametrize("name, variant", ALL)
def test_a_claim_names_its_source(name, variant):
    expect = get(name, variant).expect
    assert (expect.value is None) or expect.source


def abstract_params(model):
    model = dataclasses.replace(model, vocab_size=model.vocab_size or 65)
    row = jnp.ones((1, 8), jnp.int32)
    batch = {"tokens": row, "encoder_tokens": row, "decoder_tokens": row}
    rngs = {"params": jax.random.key(0), "jitter": jax.random.key(1)}
    return nn.meta.unbox(jax.eval_shape(Transformer(model).init, rngs, batch)["params"])


# Of the released checkpoints, counted there: GPT-2 and T5 as a whole, Switch-Base with 8 experts as well; BERT without
# what predicts tokens and next sentences, but with the pooler.
EXACT = {
    ("bert", "base"): 109_482_240,
    ("bert", "large"): 335_141_888,
    ("classify", "base"): 109_482_240,
    ("gpt2", "124m"): 124_439_808,
    ("gpt2", "355m"): 354_823_168,
    ("gpt2", "774m"): 774_030_080,
    ("gpt2", "1558m"): 1_557_611_200,
    ("t5", "small"): 60_506_624,
    ("t5", "base"): 222_903_552,
    ("t5", "large"): 737_668_096,
    ("t5", "3b"): 2_851_598_336,
    ("t5", "11b"): 11_307_321_344,
    ("switch", "base_8"): 619_339_008,
}


@pytest.mark.parametrize("name, variant", EXACT)
def test_parameters_are_those_of_the_released_checkpoint(name, variant):
    params = abstract_params(get(name, variant).model)
    heads = params.pop("heads", {})
    pooler = heads["classification"]["pooler"] if "classification" in heads else {}
    assert num_params(params) + num_params(pooler) == EXACT[name, variant]


# As the papers print them: number, unit. Rounded to that unit ours must give that number.
PRINTED = {
    ("bert", "base"): (110, 1e6),
    ("gpt3", "125m"): (125, 1e6),
    ("gpt3", "350m"): (356, 1e6),  # "350M" is the paper's name for 24 layers of 1024
    ("gpt3", "760m"): (760, 1e6),
    ("gpt3", "1.3b"): (1.3, 1e9),
    ("gpt3", "2.7b"): (2.7, 1e9),
    ("gpt3", "6.7b"): (6.7, 1e9),
    ("gpt3", "13b"): (13, 1e9),
    ("gpt3", "175b"): (175, 1e9),
    ("t5", "11b"): (11, 1e9),
    ("t5", "3b"): (3, 1e9),
    ("switch", "base_128"): (7, 1e9),
    ("switch", "large_128"): (26, 1e9),
    ("switch", "xxl_128"): (395, 1e9),
    ("switch", "c_2048"): (1571, 1e9),
    ("shakespeare_char", "default"): (0.8, 1e6),
}


@pytest.mark.parametrize("name, variant", PRINTED)
def test_parameters_round_to_what_the_paper_prints(name, variant):
    number, unit = PRINTED[name, variant]
    digits = 1 if isinstance(number, float) else 0
    assert round(num_params(abstract_params(get(name, variant).model)) / unit, digits) == number


@pytest.mark.parametrize("experts", [16, 32, 64, 128, 256])
def test_each_expert_of_switch_base_adds_a_feed_forward_and_a_router_column(experts):
    """12 of the 24 layers are sparse, 768 and 3072 wide."""
    count = {n: num_params(abstract_params(get("switch", f"base_{n}").model)) for n in (8, experts)}
    assert count[experts] - count[8] == (experts - 8) * 12 * (2 * 768 * 3072 + 768)


@pytest.mark.parametrize("variant, width", [("base", 512), ("big", 1024)])
def test_original_transformer_counted_by_hand(variant, width):
    attention = 4 * (width * width + width)
    feed_forward = 2 * width * 4 * width + 4 * width + width
    norm = 2 * width
    encoder = 6 * (attention + feed_forward + 2 * norm)
    decoder = 6 * (2 * attention + feed_forward + 3 * norm)
    expected = 37000 * width + encoder + decoder
    assert num_params(abstract_params(get("transformer_wmt", variant).model)) == expected


@pytest.mark.parametrize("variant, tokens", [("125m", 0.5e6), ("1.3b", 1e6), ("13b", 2e6), ("175b", 3.2e6)])
def test_gpt3_batches_are_those_of_table_2_1(variant, tokens):
    config = get("gpt3", variant)
    rows = config.train.global_batch_size * config.data.length
    assert abs(rows / tokens - 1) < 0.05  # the paper's M is rounded: 0.5M is 2^19
    np.testing.assert_allclose(config.train.steps * rows, 300e9, rtol=1e-4)
    np.testing.assert_allclose(config.optimizer.warmup_steps * rows, 375e6, rtol=5e-3)


def shrink(config: Config) -> Config:
    """The same kind of model and objective, small enough to compile in a second."""
    model = config.model
    layers = layer_period(model)
    return config.replace(
        model={
            "vocab_size": None,
            "num_layers": layers,
            "num_decoder_layers": layers if model.num_decoder_layers else None,
            "num_heads": 2,
            "num_kv_heads": model.num_kv_heads and 1,
            "head_dim": model.head_dim and 8,
            "embed_dim": 16,
            "mlp_dim": 24,
            "max_length": 64,
            "dropout": min(model.dropout, 0.1),
            "remat": "none",
            "init_stddev": 0.25,
            "embedding_stddev": 0.25 if model.initializer == "xavier" else model.embedding_stddev,
            "relative_buckets": 8,
            "relative_max_distance": 20,
            "attention_windows": [min(window, 16) for window in model.attention_windows],
            "experts": {"num_experts": min(model.experts.num_experts, 4)},
        },
        data={"length": 48, "target_length": 32, "train": "", "eval": ""},
        train={"steps": 10, "global_batch_size": 4, "max_rows_per_device": None, "init_from": ""},
        optimizer={"warmup_steps": 2, "decay_steps": None},
        mesh=dict.fromkeys(("data", "fsdp", "tensor", "sequence", "expert", "stage"), 1),
        tokenizer={"kind": "bytes", "vocab_size": 32000, "model_type": "unigram", "lowercase": False},
        eval={"batch_size": None, "max_batches": 0},
        expect=to_dict(Config().expect),
    )


def kind(config: Config) -> str:
    """What makes two shrunk configs the same to this test."""
    return json.dumps([to_dict(config.model), to_dict(config.objective), config.data.packing], sort_keys=True)


SHRUNK = {kind(shrink(get(name, variant))): (name, variant) for name, variant in reversed(ALL)}


def write_corpus(config: Config, folder: Path) -> str:
    """A source of the kind that the objective reads."""
    words = "the quick brown fox jumps over the lazy dog and runs far away from it".split()
    if config.objective.name == "seq2seq":
        fields = (config.data.source_field, config.data.target_field)
        records = [dict(zip(fields, (words[i % 9], words[i % 7]), strict=True)) for i in range(20)]
    elif config.objective.name == "classification":
        records = [{"text": words[i % 9], "label": i % 2} for i in range(20)]
    else:
        (folder / "a.txt").write_text("\n".join(" ".join(words[i % 5 :]) for i in range(20)))
        return f"text:{folder / 'a.txt'}"
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    return f"jsonl:{folder / 'a.jsonl'}"


def shrunk():
    """One config of each file; the others in the slow suite."""
    first = dict(SHRUNK.values())
    for name, variant in SHRUNK.values():
        yield pytest.param(name, variant, marks=[] if first[name] == variant else pytest.mark.slow)


@pytest.mark.parametrize("name, variant", list(shrunk()))
def test_shrunk_config_takes_a_step(name, variant, tmp_path):
    config = shrink(get(name, variant))
    tokenizer = ByteTokenizer(config.tokenizer.num_sentinels)
    config = config.replace(model={"vocab_size": tokenizer.vocab_size})
    objective = make_objective(config, tokenizer)
    source = open_source(write_corpus(config, tmp_path), record_fields(config))
    batch = next(make_batches(source, tokenizer, objective, config, train=True, seed=0, batch_size=4))
    batch = {key: jnp.asarray(value) for key, value in batch.items()}
    model = Transformer(config.model)
    keys = dict(zip(("params", "dropout", "jitter"), jax.random.split(jax.random.key(0), 3), strict=True))
    params = nn.meta.unbox(jax.jit(lambda: model.init(keys, batch))()["params"])

    def loss(params):
        terms, sown = model.apply(
            {"params": params}, batch, True, method=objective.terms, rngs=keys, mutable=["experts"]
        )
        means = sum(terms[name][0] / terms[name][1] for name in objective.optimized)
        auxiliary = sum(jnp.mean(v) for p, v in jax.tree_util.tree_leaves_with_path(sown) if p[-1].key != "dropped")
        return means + auxiliary, means

    (_, value), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    classes = config.model.num_classes if config.objective.name == "classification" else tokenizer.vocab_size
    chance = math.log(classes) + math.log(2) * config.objective.next_sentence
    assert 0.7 * chance < value < 1.5 * chance  # fresh parameters know nothing
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        place = jax.tree_util.keystr(path)
        assert np.isfinite(gradient).all(), place
        if "['key']['bias']" not in place:  # the same for all keys, which softmax does not see
            assert np.abs(gradient).max() > 0, f"{place} has no part in the loss"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("v5e: fsdp=-1", ("v5e: fsdp=-1",)),
        ("a b", ("a b",)),
        ("a,b", ("a,b",)),
        ("'a'", ("a",)),
        ("('a', 'b')", ("a", "b")),
        ("['a']", ("a",)),
    ],
)
def test_one_text_of_several_needs_no_brackets(text, expected):
    config = read_config_file(
        str(Path(__file__).parents[2] / "experiments" / "quickstart.py"), [f"--config.mesh.on={text}"]
    )
    assert config.mesh.on == expected
