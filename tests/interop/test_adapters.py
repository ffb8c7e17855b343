"""Adapters alone, in the form of peft: written so that peft reads them, and read as peft writes them."""

import dataclasses
import json
import re
import shutil
import warnings

import jax
import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file

import lmx
from lmx.cli import main
from lmx.config import Lora, Train
from lmx.errors import CheckpointError, LmxError
from lmx.interop.opening import open_published
from lmx.interop.pretrained import load_params, open_checkpoint
from lmx.interop.writing import unrolled
from lmx.language_model import LanguageModel
from lmx.models.lora import ADAPTERS
from tests.interop import zoo
from tests.interop.test_opening import published
from tests.interop.test_tokenizers import bert as bert_tokenizer
from tests.interop.test_tokenizers import gpt2 as gpt2_tokenizer
from tests.interop.test_tokenizers import roberta as roberta_tokenizer

EVERYWHERE = ("attention/query", "attention/value", "attention/out", "mlp/in")
VARIANTS = ["bert-classifier", "gpt2", "pythia", "t5", "llama3", "bert", "gpt2-classifier"]
VARIANTS += ["roberta-classifier", "distilbert-classifier", "bert-questions"]


def base_of(variant, folder):
    theirs = zoo.make(variant)
    theirs.save_pretrained(folder)
    tokenizers = {"bert": bert_tokenizer, "distilbert": bert_tokenizer, "roberta": roberta_tokenizer}
    tokenizers.get(variant.split("-")[0], gpt2_tokenizer)(folder)
    return theirs


def with_adapters(folder, lora):
    """The folder's model with adapters that do something."""
    opened = open_published(folder)
    model = dataclasses.replace(opened.config.model, lora=lora)
    config, tensors = open_checkpoint(folder)
    params, _ = load_params(folder, config, tensors, model)
    rng = np.random.default_rng(0)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf + 0.2 * rng.standard_normal(leaf.shape).astype(np.float32) if path[-1].key in ADAPTERS else leaf
        ),
        params,
    )
    settings = dataclasses.replace(opened.config, model=model, train=Train(init_from=str(folder)))
    return LanguageModel(settings, params, opened.tokenizer)


def score(lm, inputs):
    if not lm.config.model.heads or lm.config.model.heads == ("pooler",):
        return lm.hidden_states(inputs["input_ids"], inputs["attention_mask"])["encoder/output"]
    return lm.logits(**inputs)


def seen(scores, inputs):
    """1 where scores mean something, 0 on padding."""
    return inputs["attention_mask"][..., None] if scores.shape[:2] == inputs["input_ids"].shape else 1


def their_score(model):
    with zoo.torch.no_grad():
        outputs = model(**zoo.torch_inputs(model))
    if "start_logits" in outputs:
        return zoo.torch.stack([outputs.start_logits, outputs.end_logits], -1).numpy()
    return outputs[0].numpy()


@pytest.mark.parametrize("variant", zoo.few(VARIANTS, "bert-classifier", "gpt2"))
def test_peft_reads_what_was_written(variant, tmp_path):
    theirs = base_of(variant, tmp_path / "base")
    before = their_score(theirs)
    lm = with_adapters(tmp_path / "base", Lora(rank=3, alpha=6.0, targets=EVERYWHERE))
    inputs = zoo.inputs(theirs)
    found = np.asarray(score(lm, inputs))
    lm.save(tmp_path / "adapters", format="peft")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapters").eval()
    expected = their_score(adapted)
    used = seen(expected, inputs)
    found, expected, before = found * used, expected * used, before * used
    assert np.abs(expected - before).max() > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    again = lmx.load(tmp_path / "adapters")
    np.testing.assert_allclose(score(again, inputs), score(lm, inputs), atol=1e-5 * np.abs(expected).max())
    again.save(tmp_path / "again", format="peft")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )


@pytest.mark.parametrize(
    "variant, targets, rslora",
    [
        ("bert-classifier", ["query", "output.dense"], False),
        ("gpt2", ["c_attn"], True),
        pytest.param("bert-classifier", ["query", "output.dense"], True, marks=pytest.mark.slow),
        pytest.param("gpt2", ["c_attn"], False, marks=pytest.mark.slow),
    ],
)
def test_what_peft_writes_is_read(variant, targets, rslora, tmp_path):
    theirs = base_of(variant, tmp_path / "base")
    inputs = zoo.inputs(theirs)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=5,
        target_modules=targets,
        rank_pattern={r"layer\.1\..*query": 2},
        alpha_pattern={r"layer\.1\..*query": 7},
        use_rslora=rslora,
        init_lora_weights=False,
        fan_in_fan_out=variant == "gpt2",
        task_type="SEQ_CLS" if variant == "bert-classifier" else "CAUSAL_LM",
    )
    adapted = peft.get_peft_model(theirs, settings).eval()
    settings.base_model_name_or_path = str(tmp_path / "base")
    with zoo.torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.2 * zoo.torch.randn(parameter.shape, generator=zoo.torch.Generator().manual_seed(1)))
        expected = their_score(adapted)
    adapted.save_pretrained(tmp_path / "adapters")
    lm = lmx.load(tmp_path / "adapters")
    used = seen(expected, inputs)
    found = np.asarray(lm.logits(**inputs))
    np.testing.assert_allclose(found * used, expected * used, atol=1e-5 * np.abs(expected).max())
    merged = lm.merged()
    assert merged.config.model.lora.rank == 0
    np.testing.assert_allclose(merged.logits(**inputs) * used, expected * used, atol=1e-5 * np.abs(expected).max())


def test_some_layers_alone_may_have_adapters(tmp_path):
    theirs = base_of("llama2", tmp_path / "base")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1], init_lora_weights=False)
    adapted = peft.get_peft_model(theirs, settings).eval()
    settings.base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapters")
    inputs, expected = zoo.inputs(theirs), their_score(adapted)
    used = seen(expected, inputs)
    found = np.asarray(lmx.load(tmp_path / "adapters").logits(**inputs))
    np.testing.assert_allclose(found * used, expected * used, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_a_fine_tuned_run_exported_as_adapters_predicts_alike(tmp_path, capsys):
    folder, run = published(tmp_path / "bert"), tmp_path / "run"
    texts = [("a good film .", "good"), ("fine films", "good"), ("a dull film", "bad"), ("bad films .", "bad")] * 8
    data = tmp_path / "reviews.jsonl"
    data.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in texts))
    command = ["train", "--config", "experiments/bert_classify.py:tiny", "--workdir", str(run)]
    command += [f"--config.data.{part}=jsonl:{data}" for part in ("train", "eval")]
    command += [f"--config.train.init_from={folder}", "--config.data.length=16", "--config.model.lora.rank=4"]
    assert main([*command, "--config.train.steps=20"]) == 0
    assert main(["convert", str(run), str(tmp_path / "adapters"), "--format", "peft"]) == 0
    size = sum(file.stat().st_size for file in (tmp_path / "adapters").iterdir())
    assert size < (folder / "model.safetensors").stat().st_size / 2
    capsys.readouterr()
    assert main([*command, "--config.train.steps=25"]) == 0
    assert "resumed at step 20" in " ".join(capsys.readouterr().out.split())
    assert main(["convert", str(run), str(tmp_path / "adapters"), "--format", "peft"]) == 2  # nothing is overwritten
    shutil.rmtree(tmp_path / "adapters")
    assert main(["convert", str(run), str(tmp_path / "adapters"), "--format", "peft"]) == 0
    capsys.readouterr()
    expected = lmx.load(run).predict([text for text, _ in texts[:4]])
    onward = [f"--config.train.init_from={tmp_path / 'adapters'}", f"--workdir={tmp_path / 'onward'}"]
    assert main([*command, *onward]) == 2
    assert "holds adapters alone; merge them into their base first" in " ".join(capsys.readouterr().err.split())
    assert main(["predict", "--workdir", str(tmp_path / "adapters")] + [f"--text={text}" for text, _ in texts[:4]]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [item["label"] for item in found] == [item["label"] for item in expected]
    assert {item["label"] for item in found} <= {"good", "bad"}
    assert all(leaf.any() for name, leaf in unrolled(lmx.load(run).params).items() if name.endswith("lora_b"))
    np.testing.assert_allclose([i["probability"] for i in found], [i["probability"] for i in expected], rtol=1e-4)


@pytest.mark.parametrize("heads", [(), ("lm",)])
def test_an_output_layer_is_saved_only_where_it_is_trained(heads, tmp_path):
    base_of("pythia", tmp_path / "base")
    lm = with_adapters(tmp_path / "base", Lora(rank=2, targets=EVERYWHERE, heads=heads))
    if heads:
        output = jax.tree.map(lambda leaf: leaf + 0.5, lm.params["heads"])
        lm = dataclasses.replace(lm, params=lm.params | {"heads": output})
    lm.save(tmp_path / "adapters", format="peft")
    written = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert [name for name in written if ".lora_" not in name] == ["base_model.model.embed_out.weight" for _ in heads]
    again = lmx.load(tmp_path / "adapters")
    assert ("lm" in again.config.model.lora.heads) == bool(heads)
    assert bool(heads) != np.allclose(again.logits([[5, 6]]), lmx.load(tmp_path / "base").logits([[5, 6]]), atol=1)
    np.testing.assert_allclose(again.logits([[5, 6]]), lm.logits([[5, 6]]), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_adapters_alone_is_refused_before_anything_is_written(tmp_path):
    base_of("bert-classifier", tmp_path / "base")
    lm = lmx.load(tmp_path / "base")
    with pytest.raises(LmxError, match=r"was not fine-tuned from one \(train.init_from=''\)"):
        lm.save(tmp_path / "out", format="peft")
    lm = with_adapters(tmp_path / "base", Lora(rank=2))
    plain = dataclasses.replace(lm.config.model, lora=Lora())
    with pytest.raises(CheckpointError, match="has no adapters"):
        dataclasses.replace(lm, config=dataclasses.replace(lm.config, model=plain)).save(tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "use_dora=True of .* is not supported; known: False, None"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' of .* is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3' of .* is not supported; known: 'LORA'"),
        ({"base_model_name_or_path": "nowhere/at all"}, "adapter_config.json: there is no folder 'nowhere/at"),
    ],
)
def test_damaged_and_foreign_adapters_are_told(change, message, tmp_path):
    base_of("bert-classifier", tmp_path / "base")
    with_adapters(tmp_path / "base", Lora(rank=2)).save(tmp_path / "adapters", format="peft")
    file = tmp_path / "adapters" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        lmx.load(tmp_path / "adapters")


def test_a_regression_stays_one(tmp_path):
    published(tmp_path / "base", "bert")
    with warnings.catch_warnings(action="ignore"):  # of the fresh layer
        lm = lmx.load(tmp_path / "base", num_classes=1)
    config = lm.config.replace(model={"lora": {"rank": 2}}, objective={"task": "regression"})
    theirs, tensors = open_checkpoint(tmp_path / "base")
    params, _ = load_params(tmp_path / "base", theirs, tensors, config.model)
    config = config.replace(train={"init_from": str(tmp_path / "base")})
    lm = LanguageModel(config, params, lm.tokenizer)
    lm.save(tmp_path / "adapters", format="peft")
    found = lmx.load(tmp_path / "adapters").predict("a good film .")
    assert found.keys() == {"score"}
    np.testing.assert_allclose(found["score"], lm.predict("a good film .")["score"], rtol=1e-5)


def test_float32_adapters_leave_a_bfloat16_base_as_it_is(tmp_path):
    base_of("llama2", tmp_path / "base")
    with_adapters(tmp_path / "base", Lora(rank=2)).save(tmp_path / "adapters", format="peft")
    zoo.make("llama2").to(zoo.torch.bfloat16).save_pretrained(tmp_path / "base")
    lm = lmx.load(tmp_path / "adapters")
    kinds = {
        name.endswith(ADAPTERS): str(leaf.dtype) for name, leaf in unrolled(lm.params).items() if "heads" not in name
    }
    assert lm.config.model.dtype == "bfloat16" and kinds == {False: "bfloat16", True: "float32"}


def test_an_adapter_that_peft_has_no_place_for_is_refused(tmp_path):
    base_of("bert-classifier", tmp_path / "base")
    lm = with_adapters(tmp_path / "base", Lora(rank=2, targets=("attention/query", "output")))
    with pytest.raises(CheckpointError, match="peft has no place for heads/classification/output/lora_a"):
        lm.save(tmp_path / "out", format="peft")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(next(name for name in t if name.endswith("lora_A.weight"))), "lacks .*query.lora_A.weight"),
        (lambda t: next(iter(t.values())).fill(np.nan), "holds NaN; the file is damaged"),
        (lambda t: t.update({"base_model.model.bert.x.lora_magnitude": np.ones(1, np.float32)}), "kind that is not"),
    ],
)
def test_damaged_files_are_told(change, message, tmp_path):
    base_of("bert-classifier", tmp_path / "base")
    with_adapters(tmp_path / "base", Lora(rank=2)).save(tmp_path / "adapters", format="peft")
    file = tmp_path / "adapters" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=message):
        lmx.load(tmp_path / "adapters")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="is damaged or cut short"):
        lmx.load(tmp_path / "adapters")


def test_an_adapter_of_another_base_is_told(tmp_path):
    base_of("bert-classifier", tmp_path / "base")
    base_of("llama2", tmp_path / "other")
    with_adapters(tmp_path / "base", Lora(rank=2)).save(tmp_path / "adapters", format="peft")
    file = tmp_path / "adapters" / "adapter_config.json"
    file.write_text(file.read_text().replace(str(tmp_path / "base"), str(tmp_path / "other")))
    message = re.escape(f"the base {tmp_path / 'other'} has no place for an adapter of model.bert.encoder.layer.0")
    with pytest.raises(CheckpointError, match=message):
        lmx.load(tmp_path / "adapters")
