"""A classifier from a masked language model, by the commands of the README."""

import json
import re

import jax
import numpy as np
import pytest

import lmx as package
from tests.end_to_end.conftest import ROOT, lmx

GOOD, BAD = ("good", "great", "lovely", "superb"), ("bad", "awful", "dull", "poor")
TINY = (
    "model.embed_dim=16",
    "model.mlp_dim=32",
    "model.num_layers=2",
    "tokenizer.kind=characters",
    "data.length=32",
    "train.global_batch_size=8",
)


def flags(*settings):
    return [f"--config.{setting}" for setting in (*TINY, *settings)]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """Sentences in which one word tells the label."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    with path.open("w") as file:
        for _ in range(200):
            label = int(rng.integers(2))
            word = rng.choice(GOOD if label else BAD)
            text = f"a {word} film"
            file.write(json.dumps({"text": text, "label": "positive" if label else "negative"}) + "\n")
    return f"jsonl:{path}"


@pytest.fixture(scope="module")
def body(reviews, tmp_path_factory):
    """A few steps of masked language modelling on the same text."""
    workdir = tmp_path_factory.mktemp("runs") / "mlm"
    data = flags(f"data.train={reviews}", f"data.eval={reviews}", "train.steps=4")
    lmx("train", "--config", ROOT / "experiments" / "mlm.py:tiny", "--workdir", workdir, *data)
    return workdir


def finetune(body, reviews, workdir, *settings):
    data = flags(f"data.train={reviews}", f"data.eval={reviews}", f"train.init_from={body}", *settings)
    return lmx("train", "--config", ROOT / "experiments" / "classify.py:tiny", "--workdir", workdir, *data)


def test_fine_tuning_takes_the_body_and_a_fresh_head_and_learns(body, reviews, tmp_path):
    settings = ("train.steps=120", "optimizer.learning_rate=0.01", "model.dropout=0.0", "model.head_dropout=0.0")
    done = finetune(body, reviews, tmp_path / "run", *settings)
    told = " ".join(done.stdout.split())
    assert re.search(r"([\d,]+) examples; 120 steps are [\d.]+ epochs", told)
    assert "fresh: heads/classification/output/bias" in told and "config.tokenizer is not used" in told
    predicted = lmx("predict", "--workdir", tmp_path / "run", "--text", "a great film", "--text", "a dull film")
    first, second = (json.loads(line) for line in predicted.stdout.splitlines())
    assert (first["label"], second["label"]) == ("positive", "negative")
    assert first["probability"] > 0.9 and first["text"] == "a great film"


def test_a_frozen_body_does_not_move_and_the_head_does(body, reviews, tmp_path):
    finetune(body, reviews, tmp_path / "run", "train.steps=3", "optimizer.freeze_body=true")
    before, after = package.load(body).params, package.load(tmp_path / "run").params
    for name in ("embeddings", "encoder"):
        for a, b in zip(jax.tree.leaves(before[name]), jax.tree.leaves(after[name]), strict=True):
            np.testing.assert_array_equal(a, b)
    assert np.abs(after["heads"]["classification"]["output"]["bias"]).max() > 0


def test_more_classes_than_the_head_has_are_counted(body, reviews, tmp_path):
    data = flags(f"data.train={reviews}", f"data.eval={reviews}", "model.num_classes=3")
    config = ROOT / "experiments" / "classify.py:tiny"
    refused = lmx("train", "--config", config, "--workdir", tmp_path / "run", *data, check=False)
    assert refused.returncode == 2
    assert "2 classes (negative, positive), but model.num_classes is 3" in " ".join(refused.stderr.split())


def test_a_tokenizer_trained_apart_serves_a_run(reviews, tmp_path):
    command = ["tokenizer", "--data", reviews, "--output", tmp_path / "words", "--vocab-size", 300]
    assert "300 pieces" in lmx(*command, "--model-type", "bpe").stdout
    again = lmx(*command, check=False)
    assert again.returncode == 2 and "exists already and is not overwritten" in " ".join(again.stderr.split())
    settings = flags(f"data.train={reviews}", f"data.eval={reviews}", "train.steps=2")
    settings += ["--config.tokenizer.kind=sentencepiece", f"--config.tokenizer.path={tmp_path / 'words'}"]
    lmx("train", "--config", ROOT / "experiments" / "mlm.py:tiny", "--workdir", tmp_path / "run", *settings)
    lm = package.load(tmp_path / "run")
    assert lm.tokenizer.vocab_size == 300 == lm.config.model.vocab_size
    assert lm.tokenizer.decode(lm.tokenizer.encode("a great film")) == "a great film"
