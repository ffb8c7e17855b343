"""`lmx.load`, `save(format="hf")`, fine-tuning from a published checkpoint, and the command line."""

import dataclasses
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers as hf

import lmx
from lmx.cli import main
from lmx.config import Config, Data, Mesh, Model, Objective, from_dict, to_dict
from lmx.errors import CheckpointError, DataError, LmxError
from lmx.generation.generate import generate
from lmx.interop.opening import body_of
from lmx.interop.pretrained import is_pretrained
from lmx.interop.writing import save_pretrained
from lmx.language_model import LanguageModel
from lmx.models.transformer import Transformer
from lmx.parallel.sharding import Layout, use_layout
from lmx.text.published import PublishedTokenizer
from lmx.text.tokenizers import ByteTokenizer
from tests.interop import zoo
from tests.interop.test_families import batch_of, opened

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "good", "bad", "fine", "dull", "##s", "."]


def published(folder, variant="bert-mlm"):
    zoo.make(variant).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def test_load_gives_what_transformers_gives_from_text(tmp_path):
    folder = published(tmp_path)
    lm = lmx.load(folder)
    tokenizer, model = hf.AutoTokenizer.from_pretrained(folder), hf.AutoModelForMaskedLM.from_pretrained(folder)
    inputs = tokenizer(["a good film .", "dull films"], padding=True, return_tensors="pt")
    assert lm.encode("a good film .") == inputs["input_ids"][0].tolist()
    found = np.asarray(lm.logits(inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"]))
    expected, real = model(**inputs).logits.detach().numpy(), inputs["attention_mask"].numpy() > 0
    np.testing.assert_allclose(found[real], expected[real], atol=1e-5 * np.abs(expected).max())
    states = model(**inputs, output_hidden_states=True).hidden_states
    ours = lm.hidden_states(inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"])
    for name, state in zip(("embeddings", "layer_0/mlp_residual", "layer_1/mlp_residual"), states, strict=True):
        np.testing.assert_allclose(
            np.asarray(ours[f"encoder/{name}"])[real], state.detach().numpy()[real], atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling_beside_rope_parameters_is_what_transformers_follows(kind, tmp_path):
    folder = published(tmp_path, "llama2")
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "default"
    scaling = {"type": kind, "factor": 4.0, "original_max_position_embeddings": 16}
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    tokens = torch.arange(1, 13)[None]
    expected = hf.LlamaForCausalLM.from_pretrained(folder)(tokens).logits.detach().numpy()
    np.testing.assert_allclose(lmx.load(folder).logits(tokens), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype='float16': parameters are 'float32' or 'bfloat16'"),
        ({"num_classes": "2"}, "num_classes='2', where a number from 1 on is due"),
        ({"num_classes": 0}, "num_classes=0, where"),
    ],
)
def test_options_that_there_are_not_are_refused(options, message, tmp_path):
    with pytest.raises(LmxError, match=message):
        lmx.load(published(tmp_path), **options)


def test_two_stacks_are_no_classifier(tmp_path):
    with pytest.raises(LmxError, match="num_classes=2: a classifier reads one stack, and .* has two"):
        lmx.load(published(tmp_path, "t5"), num_classes=2)


def test_fields_that_do_not_fit_each_other_are_told_before_tensors_are_read(tmp_path):
    folder = published(tmp_path, "llama2")
    config = json.loads((folder / "config.json").read_text())
    heads = {"num_attention_heads": 5, "num_key_value_heads": 2, "head_dim": 8}
    (folder / "config.json").write_text(json.dumps(config | heads))
    with pytest.raises(LmxError, match=r"model.num_heads \(5\) is not a multiple of model.num_kv_heads \(2\)"):
        lmx.load(folder)


def test_how_numbers_are_multiplied_stays_the_runs_own(tmp_path):
    folder = published(tmp_path / "first")
    model = Model(products="int8", architecture="encoder", heads=("mlm",))
    config = body_of(Config(model=model, objective=Objective(name="mlm"), data=Data(length=64)), folder)
    assert config.model.products == "int8" and config.model.num_layers == lmx.load(folder).config.model.num_layers
    (tmp_path / "again").mkdir()
    save_pretrained(tmp_path / "again", config.model, lmx.load(folder).params, {})  # a file has no word for it
    (tmp_path / "again" / "vocab.txt").write_text((folder / "vocab.txt").read_text())
    assert lmx.load(tmp_path / "again").config.model.products == "dtype"


def test_a_body_without_a_head_represents_text_and_scores_nothing(tmp_path):
    lm = lmx.load(published(tmp_path, "bert"))
    assert "encoder/output" in lm.hidden_states("a film")
    with pytest.raises(LmxError, match="no head that scores anything"):
        lm.logits([[1, 2]])
    with pytest.raises(LmxError, match="'none' and does not generate"):
        lm.generate("a film")


def test_saving_and_loading_again_gives_the_same(tmp_path):
    lm = lmx.load(published(tmp_path / "first"))
    for format in ("hf", "lmx"):
        lm.save(tmp_path / format, format=format)
        again = lmx.load(tmp_path / format)
        np.testing.assert_array_equal(again.logits([[2, 5, 4, 6, 3]]), lm.logits([[2, 5, 4, 6, 3]]))
        assert again.encode("good films .") == lm.encode("good films .")
    assert is_pretrained(tmp_path / "hf") and not is_pretrained(tmp_path / "lmx")


def with_settings(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_a_text_ends_with_any_token_that_the_checkpoint_names(name, tmp_path):
    folder = published(tmp_path / "theirs", "gpt2")
    (folder / "generation_config.json").unlink()
    with_settings(folder, name, eos_token_id=[3])
    lm = lmx.load(folder)
    prompt = lm.encode("a film")
    (written,) = generate(lm.model, lm.params, [prompt], max_new_tokens=12, vocab_size=lm.tokenizer.vocab_size)
    last = written[4]
    with_settings(folder, name, eos_token_id=[3, last], temperature=0.5)
    lm = lmx.load(folder)
    assert lm.tokenizer.stop_ids == (3, last) == lmx.load(folder).tokenizer.stop_ids
    kept = written[: written.index(last)]
    assert lm.generate("a film", max_new_tokens=12) == lm._continuation(prompt, kept)
    for format in ("hf", "lmx"):
        lm.save(tmp_path / format, format=format)
        assert lmx.load(tmp_path / format).tokenizer.stop_ids == (3, last)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == [3, last]
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.generation_config.eos_token_id == [3, last]
    if name == "generation_config.json":
        assert (tmp_path / "hf" / name).read_text() == (folder / name).read_text()
    assert lm.tokenizer.decode(lm.tokenizer.encode("a film")) == "a film"  # whatever ends a text, it is no less a word
    with_settings(folder, name, eos_token_id=["</s>"])
    with pytest.raises(DataError, match=rf"theirs: the token id \['</s>'\] of {name} is no number"):
        lmx.load(folder)


@pytest.mark.parametrize("end", [3, [3, 5]])
def test_an_end_that_only_config_json_names_is_kept(end, tmp_path):
    folder = published(tmp_path / "theirs", "gpt2")
    (folder / "generation_config.json").unlink()
    with_settings(folder, "config.json", eos_token_id=end)
    lm, prepared = lmx.load(folder), PublishedTokenizer.open(folder).fingerprint()
    for format in ("hf", "lmx"):
        lm.save(tmp_path / format, format=format)
        again = lmx.load(tmp_path / format).tokenizer
        assert (again.eos_id, again.stop_ids) == (3, lm.tokenizer.stop_ids)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == end
    assert not (tmp_path / "hf" / "generation_config.json").exists()
    with_settings(folder, "generation_config.json", eos_token_id=6, temperature=0.7)
    other = PublishedTokenizer.open(folder)
    assert other.stop_ids == (6,) and other.fingerprint() == prepared  # texts have the same ids


def test_a_folder_without_a_tokenizer_reads_ids(tmp_path):
    zoo.make("gpt2").save_pretrained(tmp_path / "theirs")
    with_settings(tmp_path / "theirs", "generation_config.json", eos_token_id=[3, 5], temperature=0.5)
    with pytest.warns(UserWarning, match="there is no tokenizer: .* was looked for. The model reads ids, and no texts"):
        lm = lmx.load(tmp_path / "theirs")
    ids = [[5, 6, 7]]
    for format in ("lmx", "hf"):
        lm.save(tmp_path / format, format=format)
        with pytest.warns(UserWarning, match="reads ids, and no texts"):
            again = lmx.load(tmp_path / format)
        assert again.tokenizer.stop_ids == (3, 5)
        np.testing.assert_array_equal(again.logits(ids), lm.logits(ids))
        assert again.tokenizer.pad_id == lm.tokenizer.pad_id == 0
        for use in (again.encode, again.generate, again.hidden_states):
            with pytest.raises(DataError, match="came without a tokenizer: it reads ids, and no texts"):
                use("a film")


def test_an_encoder_without_a_tokenizer_says_so_too(tmp_path):
    zoo.make("bert-mlm").save_pretrained(tmp_path)
    with warnings.catch_warnings(action="ignore"):
        lm = lmx.load(tmp_path)
    assert lm.logits([[5, 6]]).shape == (1, 2, zoo.VOCAB)
    with pytest.raises(DataError, match="came without a tokenizer"):
        lm.encode("a film")


def test_a_token_without_a_row_is_refused(tmp_path):
    folder = published(tmp_path)
    (folder / "vocab.txt").write_text("\n".join([*WORDS, *(f"word{i}" for i in range(100))]) + "\n")
    with pytest.warns(UserWarning, match="has 113 ids, and the model's table 97 rows"):
        lm = lmx.load(folder, num_classes=2)
    assert lm.predict("a film")
    for use in (lm.encode, lm.predict, lambda text: lm.batch([text])):
        with pytest.raises(LmxError, match="has the token 112, and the model's table has the rows 0 to 96"):
            use("a word99")


def test_what_came_without_git_lfs_is_told(tmp_path):
    folder, note = published(tmp_path), "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "tokenizer.json").write_text(note)
    with pytest.raises(DataError, match="tokenizer.json is a note of Git LFS and not the file itself"):
        lmx.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=f"{folder}: this is not a tokenizer.json"):
        lmx.load(folder)
    (folder / "model.safetensors").write_text(note)
    with pytest.raises(CheckpointError, match="model.safetensors is a note of Git LFS .* `git lfs pull`"):
        lmx.load(folder)


def test_inputs_that_are_none_are_told(tmp_path):
    folder = published(tmp_path, "gpt2")
    with_settings(folder, "generation_config.json", eos_token_id=3)
    lm = lmx.load(folder)
    with pytest.raises(LmxError, match="the rows of input_ids differ in length; pad them"):
        lm.logits([[5, 6], [5]])
    assert lm.generate([]) == []


def test_a_decoders_classifier_is_written_with_a_padding_token(tmp_path):
    folder = published(tmp_path / "theirs", "gpt2")
    (folder / "vocab.txt").unlink()
    with_settings(folder, "config.json", pad_token_id=None)
    words = {word: i for i, word in enumerate(["<|endoftext|>", "a", "film", "good"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    with warnings.catch_warnings(action="ignore"):  # of the fresh layer
        lm = lmx.load(folder, num_classes=3)
    assert lm.labels == ("LABEL_0", "LABEL_1", "LABEL_2") and lm.tokenizer.pad_id is None
    lm.save(tmp_path / "hf", format="hf")
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    batch = lm.batch(["a good film", "good"])
    tokens = np.where(batch["segments"] > 0, batch["tokens"], theirs.config.pad_token_id)
    found = theirs(torch.tensor(tokens), attention_mask=torch.tensor(batch["segments"])).logits.detach().numpy()
    np.testing.assert_allclose(found, lm.logits(batch["tokens"], batch["segments"]), atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_a_model_of_our_own_configs_is_opened_by_transformers(name, tmp_path):
    from tests.experiments.test_configs import get

    config = get(name, "tiny")
    tokenizer = ByteTokenizer(num_sentinels=config.tokenizer.num_sentinels)
    model = to_dict(config)["model"] | {"vocab_size": tokenizer.vocab_size, "num_layers": 2, "scan_layers": True}
    config = from_dict(to_dict(config) | {"model": model, "tokenizer": {"kind": "bytes"}})
    params = jax.tree.map(
        lambda x: x.value if hasattr(x, "value") else x,
        Transformer(config.model).init(jax.random.key(0), example(config.model)),
        is_leaf=lambda x: hasattr(x, "value"),
    )["params"]
    lm = LanguageModel(config, params, tokenizer)
    lm.save(tmp_path / "hf", format="hf")
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    theirs, info = getattr(hf, described["architectures"][0]).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    ids = np.asarray([[10, 20, 30, 40]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :3]} if theirs.config.is_encoder_decoder else {})
    expected = theirs.eval()(**{k: zoo.torch.tensor(v) for k, v in inputs.items()})[0].detach().numpy()
    found = lm.logits(ids, decoder_input_ids=inputs.get("decoder_input_ids"))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "hf")("héllo")["input_ids"] == tokenizer.encode("héllo")


def example(model):
    two = model.architecture == "encoder_decoder"
    return dict.fromkeys(("encoder_tokens", "decoder_tokens") if two else ("tokens",), jnp.ones((1, 2), jnp.int32))


def test_a_distilbert_is_written_as_one(tmp_path):
    lm = lmx.load(published(tmp_path / "first", "distilbert-mlm"))
    lm.save(tmp_path / "hf", format="hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["DistilBertForMaskedLM"]


def test_what_no_family_has_is_refused_before_anything_is_written(tmp_path):
    lm = lmx.load(published(tmp_path / "first"))
    odd = dataclasses.replace(lm.config.model, attention_windows=(8,))
    with pytest.raises(CheckpointError, match=r"it is not 'bert', because model.attention_windows is \(8, 8\)"):
        dataclasses.replace(lm, config=dataclasses.replace(lm.config, model=odd)).save(tmp_path / "hf", format="hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow
def test_fine_tuning_from_a_published_checkpoint_and_going_on(tmp_path, capsys):
    folder, run = published(tmp_path / "bert"), tmp_path / "run"
    texts = [("a good film .", 1), ("fine films", 1), ("a dull film", 0), ("bad films .", 0)] * 8
    data = tmp_path / "reviews.jsonl"
    data.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in texts))
    command = ["train", "--config", "experiments/bert_classify.py:tiny", "--workdir", str(run)]
    command += [f"--config.data.{part}=jsonl:{data}" for part in ("train", "eval")]
    command += [
        f"--config.train.init_from={folder}",
        "--config.data.length=16",
        "--config.optimizer.learning_rate=3e-3",
    ]
    assert main([*command, "--config.train.steps=150"]) == 0
    told = re.sub(r"\s+", "", capsys.readouterr().out)  # lines may be wrapped anywhere
    assert f"modelof{folder}" in told and "fresh:heads/classification/output/bias" in told
    for file in folder.iterdir():
        file.unlink()  # the run does not need it any more
    folder.rmdir()
    assert main([*command, "--config.train.steps=160"]) == 0
    assert "resumed at step 150" in re.sub(r"\s+", " ", capsys.readouterr().out)
    assert main(["predict", "--workdir", str(run), "--text", "a good film .", "--text", "bad films ."]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [prediction["label"] for prediction in found] == ["1", "0"]
    assert main(["convert", str(run), str(tmp_path / "out"), "--format", "hf"]) == 0
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    scores = theirs(**tokenizer("a good film .", return_tensors="pt")).logits.softmax(-1)
    np.testing.assert_allclose(scores.max().item(), found[0]["probability"], rtol=1e-4)
    assert theirs.config.id2label == {0: "0", 1: "1"}


def test_a_fresh_head_that_nothing_would_train_is_refused(tmp_path, capsys):
    folder = published(tmp_path / "bert", "bert")  # without the head of a masked language model
    command = ["train", "--config", "experiments/mlm.py:tiny", "--workdir", str(tmp_path / "run")]
    command += [f"--config.train.init_from={folder}", "--config.model.lora.rank=2", "--config.data.length=16"]
    assert main(command) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
    assert "heads/mlm/" in told and "would stay as it was drawn" in told and "model.lora.heads" in told


def test_a_name_that_is_nowhere_says_where_was_looked(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="no-such/model"):
        lmx.load("no-such/model")


def test_a_hub_name_is_opened_from_the_cache_without_a_network(tmp_path, monkeypatch):
    from huggingface_hub import constants

    cached = tmp_path / "models--somebody--small"
    published(cached / "snapshots" / "0123abcd")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    lm = lmx.load("somebody/small")
    assert lm.config.model.heads == ("mlm",) and lm.encode("a film") == [2, 5, 6, 3]


@pytest.mark.parametrize(
    "variant",
    zoo.few(
        [
            *("bert-mlm", "roberta-mlm", "distilbert-mlm", "gpt2", "pythia", "t5", "mt5", "switch-roomy"),
            *("llama3", "mistral", "qwen2", "qwen3", "mixtral"),
        ],
        "bert-mlm",
    ),
)
def test_a_step_and_a_generation_on_a_mesh(variant, tmp_path):
    layout = Layout.of(Mesh(data=2, fsdp=2, tensor=2))
    alone, spread = opened(variant, tmp_path), opened(variant, tmp_path, layout=layout)
    inputs = {name: np.repeat(value, 2, 0) for name, value in zoo.inputs(alone.theirs).items()}
    batch, head = batch_of(alone.model, inputs), f"{alone.model.heads[0]}_logits"

    @jax.jit
    def step(params):
        def score(params):
            return jax.nn.logsumexp(Transformer(alone.model).apply({"params": params}, batch)[head], -1).mean()

        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(score)(params))

    expected = step(alone.params)
    with use_layout(layout):
        found = step(spread.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jax.device_get(found), expected)
    if variant in zoo.GENERATES:
        prompts = [[5, 6, 7, 8], [9, 10]]
        ours = [
            generate(Transformer(alone.model), params, prompts, max_new_tokens=8)
            for params in (alone.params, spread.params)
        ]
        assert ours[0] == ours[1]
