"""Every family and variant against transformers: logits, gradients, generation, and the way back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lmx.errors import CheckpointError
from lmx.generation.generate import generate
from lmx.interop.families import family_of, head_of
from lmx.interop.files import open_tensors
from lmx.interop.pretrained import load_params, model_config, read_config
from lmx.interop.writing import save_pretrained
from lmx.models.stack import unroll_params
from lmx.models.transformer import Transformer
from tests.interop import zoo


@dataclasses.dataclass
class Opened:
    """A variant as transformers has it and as we opened it."""

    theirs: torch.nn.Module
    folder: object
    model: object
    params: dict
    report: object


def opened(variant, folder, dtype=None, layout=None, **changes):
    theirs = zoo.make(variant)
    if dtype is not None:
        theirs = theirs.to(dtype)
    theirs.save_pretrained(folder)
    config, tensors = read_config(folder), open_tensors(folder)
    _, head = head_of(family_of(config["model_type"]), config)
    model = dataclasses.replace(model_config(config, tensors, head.heads, theirs.config.num_labels), **changes)
    params, report = load_params(folder, config, tensors, model, layout)
    return Opened(theirs, folder, model, params, report)


def batch_of(model, inputs):
    ids = {name: jnp.asarray(value, jnp.int32) for name, value in inputs.items()}
    if model.architecture == "encoder_decoder":
        names = {
            "input_ids": "encoder_tokens",
            "attention_mask": "encoder_segments",
            "decoder_input_ids": "decoder_tokens",
        }
    else:
        names = {"input_ids": "tokens", "attention_mask": "segments"}
    return {names[name]: value for name, value in ids.items()}


def pairs(outputs, found):
    """What corresponds: theirs by name, and ours."""
    names = {
        "prediction_logits": "mlm_logits",
        "seq_relationship_logits": "classification_logits",
        "pooler_output": "pooled",
        "last_hidden_state": "hidden",
    }
    logits = next((name for name in ("lm_logits", "mlm_logits", "classification_logits") if name in found), None)
    if "start_logits" in outputs:
        yield torch.stack([outputs.start_logits, outputs.end_logits], -1), found["span_logits"]
    for name, value in outputs.items():
        if name == "logits":
            yield value, found[logits]
        elif name in names and names[name] in found:
            yield value, found[names[name]]


# One or two of each family every day; the others are slow tests.
DAILY = [
    *("bert", "bert-mlm", "roberta-mlm", "distilbert-classifier", "gpt2", "gpt2-classifier", "pythia"),
    *("t5", "t5-v1.1", "switch", "llama2", "llama3", "mistral", "qwen2-windows", "qwen3", "mixtral"),
]


@pytest.mark.parametrize("variant", zoo.few(list(zoo.VARIANTS), *DAILY))
def test_outputs_are_equal_and_so_are_the_files_on_the_way_back(variant, tmp_path):
    it = opened(variant, tmp_path / "there")
    assert not it.report.fresh
    inputs = zoo.inputs(it.theirs)
    with torch.no_grad():
        outputs = it.theirs(**zoo.torch_inputs(it.theirs))
    found = Transformer(it.model).apply({"params": it.params}, batch_of(it.model, inputs))
    compared = 0
    for theirs, ours in pairs(outputs, found):
        theirs, ours = theirs.numpy(), np.asarray(ours)
        if theirs.shape[:2] == inputs["attention_mask"].shape:  # what stands on padding means nothing
            theirs, ours = (x[inputs["attention_mask"] > 0] for x in (theirs, ours))
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
        compared += 1
    assert compared

    back = tmp_path / "back"
    back.mkdir()
    extra = {"id2label": it.theirs.config.id2label, "pad_token_id": it.theirs.config.pad_token_id}
    save_pretrained(back, it.model, it.params, extra, type(it.theirs).__name__)
    again, info = type(it.theirs).from_pretrained(back, output_loading_info=True)
    assert not any(info.values()), info
    tensors = it.theirs.state_dict()
    assert {name: torch.equal(tensors[name], value) for name, value in again.state_dict().items()} == dict.fromkeys(
        tensors, True
    )
    with torch.no_grad():
        np.testing.assert_allclose(again(**zoo.torch_inputs(again))[0], outputs[0], atol=1e-6)


@pytest.mark.parametrize(
    "variant",
    zoo.few(["bert-mlm", "gpt2", "pythia", "t5-v1.1", "switch", "qwen3", "mixtral"], "bert-mlm", "switch", "mixtral"),
)
def test_gradients_are_equal(variant, tmp_path):
    it = opened(variant, tmp_path)
    inputs, name = zoo.inputs(it.theirs), f"{it.model.heads[0]}_logits"
    rows = inputs.get("decoder_input_ids", inputs["input_ids"])
    weights = np.random.default_rng(3).standard_normal((*rows.shape, zoo.VOCAB)).astype(np.float32) / zoo.VOCAB
    if rows is inputs["input_ids"]:
        weights *= inputs["attention_mask"][..., None]
    (it.theirs(**zoo.torch_inputs(it.theirs)).logits * torch.tensor(weights)).sum().backward()

    def score(params):
        return (Transformer(it.model).apply({"params": params}, batch_of(it.model, inputs))[name] * weights).sum()

    gradients = jax.device_get(unroll_params(jax.jit(jax.grad(score))(it.params)))
    by_path = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
    }
    expected = {
        name: parameter.grad.numpy() for name, parameter in it.theirs.named_parameters() if parameter.grad is not None
    }
    written = {}
    family = family_of(read_config(it.folder)["model_type"])
    for weight in family.weights(it.model):
        if weight.ours in by_path:
            weight.write(by_path[weight.ours], written)
    compared = [name for name in written if name in expected]
    assert len(compared) > 10
    for name in compared:
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(written[name], expected[name], atol=1e-4 * scale + 1e-6, err_msg=name)


@pytest.mark.parametrize(
    "variant",
    zoo.few(
        ["bert-mlm", "roberta-mlm", "gpt2", "pythia", "t5", "llama3", "mistral", "qwen3"], "bert-mlm", "t5", "mistral"
    ),
)
def test_documents_packed_in_a_row_are_as_theirs_alone(variant, tmp_path):
    it = opened(variant, tmp_path)
    two = it.model.architecture == "encoder_decoder"
    rng = np.random.default_rng(7)
    parts = [{"input_ids": rng.integers(3, zoo.VOCAB, (1, length))} for length in (9, 6)]
    if two:
        parts = [
            p | {"decoder_input_ids": rng.integers(3, zoo.VOCAB, (1, n))} for p, n in zip(parts, (4, 5), strict=True)
        ]
    batch = {}
    for theirs, prefix in {"input_ids": "encoder_" if two else "", "decoder_input_ids": "decoder_"}.items():
        rows = [part[theirs] for part in parts if theirs in part]
        if rows:
            batch[f"{prefix}tokens"] = np.concatenate([*rows, np.zeros((1, 2), int)], axis=1)
            lengths = [row.shape[1] for row in rows]
            batch[f"{prefix}segments"] = np.repeat([1, 2, 0], [*lengths, 2])[None]
            batch[f"{prefix}positions"] = np.concatenate([*map(np.arange, lengths), np.arange(2)])[None]
    batch = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}
    found = np.asarray(Transformer(it.model).apply({"params": it.params}, batch)[f"{it.model.heads[0]}_logits"])
    start = 0
    for part in parts:
        with torch.no_grad():
            expected = it.theirs(**{name: torch.tensor(ids) for name, ids in part.items()}).logits.numpy()
        stop = start + expected.shape[1]
        np.testing.assert_allclose(found[:, start:stop], expected, atol=1e-5 * np.abs(expected).max())
        start = stop


@pytest.mark.parametrize("variant", zoo.few(zoo.GENERATES, "gpt2", "pythia", "t5", "switch-roomy", "qwen3"))
def test_greedy_generation_is_identical_with_prompts_of_unequal_length(variant, tmp_path):
    it = opened(variant, tmp_path)
    two = it.model.architecture == "encoder_decoder"
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, zoo.VOCAB, length).tolist() for length in (9, 5)]
    ours = generate(Transformer(it.model), it.params, prompts, max_new_tokens=64, decoder_start_id=0)
    longest = max(map(len, prompts))
    padded = [[0] * (0 if two else longest - len(p)) + p + [0] * (longest - len(p) if two else 0) for p in prompts]
    mask = [[int(token > 0) for token in row] for row in padded]
    it.theirs.generation_config.eos_token_id = None
    with torch.no_grad():
        theirs = it.theirs.generate(
            torch.tensor(padded),
            attention_mask=torch.tensor(mask),
            max_new_tokens=64,
            do_sample=False,
            use_cache=not two,  # theirs fails where the decoder is deeper than the encoder
            pad_token_id=0,
        )
    assert ours == theirs[:, 1 if two else longest :].tolist()


@pytest.mark.parametrize("penalty", [1.0, 2.0])
@pytest.mark.parametrize("variant", ["gpt2", "t5"])
def test_beam_search_finds_the_same_texts(variant, penalty, tmp_path):
    it = opened(variant, tmp_path)
    two = it.model.architecture == "encoder_decoder"
    prompts = np.random.default_rng(5).integers(3, zoo.VOCAB, (3, 7))
    arguments = {"max_new_tokens": 12, "num_beams": 4, "length_penalty": penalty}
    end = 11
    ours = generate(Transformer(it.model), it.params, prompts.tolist(), stop_ids=[end], decoder_start_id=0, **arguments)
    it.theirs.generation_config.eos_token_id = end
    with torch.no_grad():
        theirs = it.theirs.generate(
            torch.tensor(prompts),
            do_sample=False,
            pad_token_id=0,
            use_cache=not two,  # theirs fails where the decoder is deeper than the encoder
            **arguments,
        )
    theirs = theirs[:, 1 if two else 7 :].tolist()
    assert ours == [row[: row.index(end) + 1] if end in row else row for row in theirs]


@pytest.mark.parametrize("variant", zoo.few(list(zoo.VARIANTS), "bert-mlm", "switch"))
def test_bfloat16_stays_and_comes_back_to_the_bit(variant, tmp_path):
    it = opened(variant, tmp_path / "there", torch.bfloat16)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(it.params)} == {"bfloat16"}
    (tmp_path / "back").mkdir()
    extra = {"id2label": it.theirs.config.id2label, "pad_token_id": it.theirs.config.pad_token_id}
    save_pretrained(tmp_path / "back", it.model, it.params, extra, type(it.theirs).__name__)
    again = type(it.theirs).from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    tensors = it.theirs.state_dict()
    assert all(torch.equal(tensors[name], value) for name, value in again.state_dict().items())


@pytest.mark.parametrize("variant", ["bert-mlm", "t5", "qwen2-windows"])
def test_scanned_and_unrolled_layers_are_read_alike(variant, tmp_path):
    scanned = opened(variant, tmp_path, scan_layers=variant != "qwen2-windows")
    unrolled = opened(variant, tmp_path, scan_layers=False)
    for a, b in zip(jax.tree.leaves(unroll_params(scanned.params)), jax.tree.leaves(unrolled.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "variant, key, value, message",
    [
        ("llama2", "rope_scaling", {"rope_type": "longrope", "factor": 2.0}, "rope_type='longrope' of config.json"),
        ("llama2", "rope_scaling", "yarn", "rope_scaling='yarn' of config.json"),
        ("llama2", "model_type", "lama", "model_type 'lama' of config.json is not supported; did you mean 'llama'"),
        ("bert", "position_embedding_type", "relative_key", "position_embedding_type='relative_key'"),
        ("bert", "hidden_act", "mish", "hidden_act='mish' of config.json is not supported; known: 'gelu'"),
        ("bert", "architectures", ["BertForTokens"], "architecture 'BertForTokens' of config.json"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx=True"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(variant, key, value, message, tmp_path):
    zoo.make(variant).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {key: value}
    with pytest.raises(CheckpointError, match=message):
        _, head = head_of(family_of(config["model_type"]), config)
        model_config(config, open_tensors(tmp_path), head.heads)
