"""`LanguageModel`: logits, intermediates, text in and out, prediction, and folders opened and written."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lmx
from lmx import language_model
from lmx.config import Config, from_dict
from lmx.errors import CheckpointError, LmxError
from lmx.generation.generate import pad_prompts
from lmx.language_model import LanguageModel
from lmx.loading import _layout
from lmx.models.heads import num_params
from lmx.models.stack import unroll_params
from lmx.models.transformer import Transformer
from lmx.text.tokenizers import ByteTokenizer
from lmx.training.checkpoints import Checkpoints
from lmx.training.state import init_state
from lmx.training.workdir import write_config

SIZES = {"num_layers": 2, "embed_dim": 16, "num_heads": 2, "mlp_dim": 24, "max_length": 64, "head_dim": 8}
MODELS = {
    "causal": {"architecture": "decoder"},
    "prefix_lm": {"architecture": "decoder"},
    "mlm": {"architecture": "encoder", "heads": ["mlm"], "num_token_types": 2},
    "classification": {"architecture": "encoder", "heads": ["classification"], "num_classes": 3, "num_token_types": 2},
    "seq2seq": {"architecture": "encoder_decoder", "position": "relative"},
}


@functools.cache
def make(objective="causal", *, pair=False, regression=False, scan=True, **model):
    tokenizer = ByteTokenizer()
    fields = SIZES | MODELS[objective] | {"vocab_size": tokenizer.vocab_size, "scan_layers": scan} | model
    config = from_dict(
        {
            "model": fields | ({"num_classes": 1} if regression else {}),
            "objective": {"name": objective, "task": "regression" if regression else "classification"},
            "data": {
                "length": 32,
                "target_length": 32,
                "pair_field": "second" if pair else "",
                "labels": [] if regression else ["good", "bad", "ugly"],
            },
        }
    )
    rng = np.random.default_rng(0)
    spread = {"scale": (1.0, 0.1), "bias": (0.0, 0.1), "kernel": (0.0, 0.4), "table": (0.0, 1.0)}

    def values(path, leaf):
        return jnp.asarray(rng.normal(*spread[path[-1].key], leaf.shape), jnp.float32)

    return LanguageModel(config, jax.tree.map_with_path(values, _layout(Transformer(config.model))), tokenizer)


def test_logits_do_not_depend_on_padding_on_either_side():
    lm = make()
    ids = np.array([[10, 20, 30, 40]])
    expected = lm.logits(ids)
    assert expected.dtype == jnp.float32 and expected.shape == (1, 4, 261)
    mask = np.array([[1, 1, 1, 1, 0, 0]])
    right = lm.logits(np.pad(ids, ((0, 0), (0, 2))), mask)[:, :4]
    left = lm.logits(np.pad(ids, ((0, 0), (2, 0))), mask[:, ::-1])[:, 2:]
    np.testing.assert_allclose(right, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(left, expected, rtol=1e-4, atol=1e-4)


def test_logits_are_the_models_own():
    lm = make("seq2seq")
    source, target = np.array([[7, 8, 9]]), np.array([[0, 11]])
    logits = lm.logits(source, decoder_input_ids=target)
    batch = {"encoder_tokens": source, "decoder_tokens": target}
    expected = jax.jit(lm.model.apply)({"params": lm.params}, batch)
    np.testing.assert_allclose(logits, expected["lm_logits"], rtol=1e-5, atol=1e-5)


def test_token_types_matter_and_a_classifier_gives_classes():
    lm = make("classification")
    ids = np.array([[1, 70, 71, 2], [1, 80, 81, 2]])
    assert lm.logits(ids).shape == (2, 3)
    types = np.array([[0, 0, 1, 1], [0, 0, 0, 0]])
    changed = np.abs(lm.logits(ids, token_type_ids=types) - lm.logits(ids)).max(-1)
    assert changed[0] > 1e-3 and changed[1] == 0


@pytest.mark.parametrize(
    "objective, arguments, message",
    [
        ("causal", {"input_ids": [1, 2]}, r"input_ids must be .* of shape \(2,\)"),
        ("causal", {"input_ids": [[0.5]]}, "whole numbers"),
        ("causal", {"input_ids": [[1, 261]]}, "input_ids must be from 0 to 260; found 1 to 261"),
        ("causal", {"input_ids": [[1, 2]], "attention_mask": [[1]]}, r"attention_mask has shape \(1, 1\)"),
        ("causal", {"input_ids": [[1]], "token_type_ids": [[0]]}, "no token types"),
        ("causal", {"input_ids": [[1]], "decoder_input_ids": [[0]]}, "are for encoder-decoders; this is: decoder"),
        ("seq2seq", {"input_ids": [[1]]}, "needs decoder_input_ids"),
    ],
)
def test_inputs_that_do_not_fit_are_named(objective, arguments, message):
    with pytest.raises(LmxError, match=message):
        make(objective).logits(**arguments)


def test_hidden_states_name_every_layer_the_same_whether_scanned_or_not():
    scanned = make(num_layers=4, attention_windows=(0, 2))
    unrolled = make(num_layers=4, attention_windows=(0, 2), scan=False)
    unrolled = dataclasses.replace(unrolled, params=unroll_params(scanned.params))
    ids = np.array([[5, 6, 7]])
    states, expected = scanned.hidden_states(ids), unrolled.hidden_states(ids)
    assert states.keys() == expected.keys()
    layer = {"attention/weights", "attention_residual", "mlp_residual"}
    names = {"decoder/embeddings", "decoder/output"} | {f"decoder/layer_{i}/{x}" for i in range(4) for x in layer}
    assert set(states) == names
    for name in names:
        np.testing.assert_allclose(states[name], expected[name], rtol=1e-4, atol=1e-4, err_msg=name)
    weights = states["decoder/layer_1/attention/weights"]  # window 2: the third token does not see the first
    assert weights.shape == (1, 2, 3, 3)
    assert weights[0, 0, 2, 0] == 0 and states["decoder/layer_2/attention/weights"][0, 0, 2, 0] > 0
    assert np.abs(states["decoder/layer_0/mlp_residual"] - states["decoder/layer_3/mlp_residual"]).max() > 0.1


def test_hidden_states_take_text():
    lm = make("mlm")
    states = lm.hidden_states(["abc", "a"])
    assert states["encoder/output"].shape == (2, 5, 16)  # <s> a b c </s>
    alone = lm.hidden_states("a")["encoder/output"]
    np.testing.assert_allclose(states["encoder/output"][1, :3], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", ["causal", "prefix_lm", "seq2seq"])
def test_greedy_text_follows_the_logits(objective):
    lm = make(objective)
    prompt, eos = "ab", lm.tokenizer.eos_id
    ids = lm.encode(prompt)
    assert ids == ([102, 103, 2] if objective == "seq2seq" else [1, 102, 103])
    forward, new = jax.jit(lm.model.apply), []
    while len(new) < 5 and eos not in new:
        read = [0, *new] if objective == "seq2seq" else [*ids, *new]
        tokens = np.array([read + [0] * (8 - len(read))])  # what stands behind does not matter to a decoder
        batch = {"encoder_tokens": np.array([ids]), "decoder_tokens": tokens, "tokens": tokens}
        if objective == "prefix_lm":
            batch["prefix"] = np.array([[1] * len(ids) + [0] * (8 - len(ids))])
        logits = forward({"params": lm.params}, batch)["lm_logits"]
        new.append(int(logits[0, len(read) - 1].argmax()))
    text = lm.generate(prompt, max_new_tokens=5)
    assert text == lm.tokenizer.decode(new)
    assert lm.generate([prompt, "c"], max_new_tokens=5)[0] == text


def test_the_form_to_generate_with_is_made_once(monkeypatch):
    made = []
    form = language_model.for_decoding
    monkeypatch.setattr(language_model, "for_decoding", lambda *of: made.append(of) or form(*of))
    lm = dataclasses.replace(make())
    assert lm.generate("ab", max_new_tokens=5) == lm.generate("ab", max_new_tokens=5) and len(made) == 1
    other = dataclasses.replace(lm, params=jax.tree.map(lambda x: -x, lm.params))
    assert other.generate("ab", max_new_tokens=5) != lm.generate("ab", max_new_tokens=5) and len(made) == 2


def test_text_ends_before_a_stop_string():
    lm = make()
    arguments = {"max_new_tokens": 30, "temperature": 1.0, "seed": 3}
    text = lm.generate("ab", **arguments)
    for stop in (text[4], text[5:8]):
        assert lm.generate("ab", stop=["never", stop], **arguments) == text[: text.index(stop)]


def test_what_does_not_generate_or_classify_says_so():
    with pytest.raises(LmxError, match="objective 'mlm' and does not generate"):
        make("mlm").generate("a")
    with pytest.raises(LmxError, match="objective 'causal' and is no classifier"):
        make("causal").predict("a")
    with pytest.raises(LmxError, match=r"draft must be a model, such as lmx.load\(...\) opens, not 'runs/small'"):
        make("causal").generate("a", draft="runs/small")


def test_a_model_in_eight_bits_stays_as_it_is():
    quantized = make().quantized()
    assert quantized.quantized() is quantized


def test_predict_gives_the_label_and_probability_of_the_logits():
    lm = make("classification", pooling="mean")
    texts = ["abc", "a longer text", "z", "what", "now", "q q q q"]
    predictions = lm.predict(texts)
    ids, mask = pad_prompts([lm.encode(text) for text in texts], 32, 0, left=False)
    for logits, prediction in zip(lm.logits(ids, mask), predictions, strict=True):
        probabilities = np.asarray(jax.nn.softmax(logits))
        assert prediction["label"] == ("good", "bad", "ugly")[probabilities.argmax()]
        assert prediction["probability"] == pytest.approx(probabilities.max(), rel=1e-4)
    assert len({prediction["label"] for prediction in predictions}) > 1
    assert lm.predict("abc")["label"] == predictions[0]["label"]


def test_a_batch_is_cut_padded_and_scored():
    lm = make("classification", pooling="mean")
    batch = lm.batch(["abc", "a longer text"], labels=["ugly", 1], length=8)
    tokens = [[1, *(101 + np.arange(1, 4)), 2, 0, 0, 0], [1, *lm.tokenizer.encode("a long"), 2]]
    np.testing.assert_array_equal(batch["tokens"], tokens)
    np.testing.assert_array_equal(batch["segments"], [[1] * 5 + [0] * 3, [1] * 8])
    assert batch["labels"].tolist() == [2, 1] and batch["label_weights"].tolist() == [1, 1]
    score = jax.jit(functools.partial(lm.model.apply, method=lm.objective.terms))
    total, weight = score({"params": lm.params}, batch)["loss"]
    scores = jax.nn.log_softmax(lm.logits(batch["tokens"], batch["segments"]))
    np.testing.assert_allclose(total, -(scores[0, 2] + scores[1, 1]), rtol=1e-5)
    assert weight == 2 and lm.batch("abc")["tokens"].shape == (1, 5)
    for texts, labels, message in (([], None, r"got 0 text"), (["a"], [0, 1], r"got 1 text\(s\) and 2 label")):
        with pytest.raises(LmxError, match=message):
            lm.batch(texts, labels)
    with pytest.raises(LmxError, match="is no classifier"):
        make("causal").batch(["a"])


def test_predict_reads_pairs_with_their_token_types():
    lm = make("classification", pair=True)
    prediction = lm.predict([("ab", "c"), ("c", "ab")])[0]
    logits = lm.logits([[1, 102, 103, 2, 104, 2]], token_type_ids=[[0, 0, 0, 0, 1, 1]])
    assert prediction["probability"] == pytest.approx(float(jax.nn.softmax(logits[0]).max()), rel=1e-4)
    with pytest.raises(LmxError, match="reads pairs of texts, and got 'ab'"):
        lm.predict(["ab"])
    with pytest.raises(LmxError, match="reads single texts"):
        make("classification").predict([("a", "b")])


def test_regression_predicts_a_score():
    lm = make("classification", regression=True)
    assert lm.predict("abc") == {"score": pytest.approx(float(lm.logits([lm.encode("abc")])[0, 0]), rel=1e-4)}


def assert_same_model(lm, other):
    assert lm.config == other.config
    assert jax.tree.structure(lm.params) == jax.tree.structure(other.params)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), lm.params, other.params)))
    assert other.tokenizer.encode("aé") == lm.tokenizer.encode("aé")


def test_a_saved_model_opens_again(tmp_path):
    lm = make("classification")
    lm.save(tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert_same_model(lm, lmx.load(tmp_path / "export"))
    with pytest.raises(LmxError, match="exists already"):
        lm.save(tmp_path / "export")
    with pytest.raises(CheckpointError, match="exported model without steps"):
        lmx.load(tmp_path / "export", step=3)


def test_formats_that_are_not_there_are_named(tmp_path):
    with pytest.raises(LmxError, match="did you mean 'lmx'"):
        make().save(tmp_path / "export", format="lm")
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_opens_at_its_newest_or_a_named_step(tmp_path):
    lm = make()
    write_config(tmp_path, lm.config, Config(), num_params(lm.params))
    lm.tokenizer.save(tmp_path / "tokenizer")
    optimizer = optax.sgd(0.1)
    with Checkpoints(tmp_path) as checkpoints:
        for step, params in ((1, jax.tree.map(jnp.zeros_like, lm.params)), (2, lm.params)):
            checkpoints.save(step, init_state(params, optimizer), {}, {})
    assert_same_model(lm, lmx.load(tmp_path))
    assert not any(leaf.any() for leaf in jax.tree.leaves(lmx.load(tmp_path, step=1).params))


def test_what_is_no_model_is_an_error_that_says_what_was_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no folder '.*nowhere'"):
        lmx.load(tmp_path / "nowhere")
    for content, message in (
        (
            '{"sort": "gpt2"}',
            "holds no model.* has config.json .*config.json of a published checkpoint: its model_type is no text",
        ),
        ("[1]", "it is no JSON object"),
        ('{"model_type": "gpt2",}', "line 1 column 2"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            lmx.load(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(CheckpointError, match=r"config.json, tokenizer/ and checkpoints/.* has config.json, tokenizer"):
        lmx.load(tmp_path)
    (tmp_path / "tokenizer").rmdir()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(CheckpointError, match="has no weights: neither model.safetensors"):
        lmx.load(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(CheckpointError, match="There are model-00001-of-00002.safetensors; shards need their index"):
        lmx.load(tmp_path)
    with pytest.raises(LmxError, match="has no steps; leave step=3 out"):
        lmx.load(tmp_path, step=3)


def test_parameters_of_another_size_are_an_error(tmp_path):
    lm = make()
    lm.save(tmp_path / "export")
    path = tmp_path / "export" / "config.json"
    contents = json.loads(path.read_text())
    contents["config"]["model"]["mlp_dim"] = 32
    path.write_text(json.dumps(contents))
    with pytest.raises(CheckpointError, match="do not fit the config.json"):
        lmx.load(tmp_path / "export")
