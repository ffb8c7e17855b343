"""A run on a mixture: what it writes of each source, and of the room that its rows waste."""

import io
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from lmx.config import Config
from lmx.errors import ConfigError
from lmx.evaluation.held_out import evaluate_workdir
from lmx.parallel.mesh import make_mesh
from lmx.text.tokenizers import ByteTokenizer
from lmx.training.experiment import resolve, with_pairs
from lmx.training.loop import evaluate, train
from lmx.training.metrics import read_metrics
from lmx.training.step import packing_efficiency

TINY = {
    "model": {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "mlp_dim": 16, "max_length": 32, "dropout": 0.0},
    "data": {"length": 32},
    "train": {"steps": 4, "global_batch_size": 8, "log_every": 2, "eval_every": 4, "samples": 0},
    "optimizer": {"warmup_steps": 1},
}


@pytest.fixture(scope="module")
def mixed_run(tmp_path_factory):
    """The workdir of a short run on a mixture of three sources, held out by themselves too, and what it printed."""
    folder = tmp_path_factory.mktemp("mixture")
    for name, letters in (("a", "abc"), ("b", "xyz"), ("c", "12345")):
        (folder / f"{name}.jsonl").write_text("".join(f'{{"text": "{letter * 40}"}}\n' for letter in letters * 8))
    sources = {name: f"jsonl:{folder}/{name}.jsonl" for name in "abc"}
    weighted = " + ".join(f"{weight}*{sources[name]}[:90%]" for name, weight in (("a", 0.5), ("b", 0.25), ("c", 0.25)))
    held_out = " + ".join(f"{source}[90%:]" for source in sources.values())
    config = Config().replace(**TINY | {"data": {"length": 32, "train": weighted, "eval": held_out}})
    printed = io.StringIO()
    train(config, folder / "run", console=Console(file=printed, width=200), devices=jax.devices()[:1])
    return folder / "run", {name: f"{source}[90%:]" for name, source in sources.items()}, printed.getvalue()


@pytest.mark.slow
def test_every_source_has_its_losses_in_a_run(mixed_run):
    workdir, sources, printed = mixed_run
    for line in read_metrics(workdir):
        if "train/loss" in line:  # the shares are of rows, and these rows are full
            own = np.array([line[f"train/loss/{name}"] for name in sources])
            assert line["train/loss"] == pytest.approx(own @ [0.5, 0.25, 0.25], rel=0.02)
    last = read_metrics(workdir)[-1]
    for name, source in sources.items():
        alone = evaluate_workdir(workdir, source=source, console=Console(quiet=True))
        assert last[f"eval/loss/{name}"] == pytest.approx(alone["eval/loss"], rel=1e-5)
        assert last[f"eval/accuracy/{name}"] == pytest.approx(alone["eval/accuracy"], rel=1e-5)
        assert not [metric for metric in alone if metric.count("/") > 1]
    assert min(last[f"eval/loss/{name}"] for name in sources) < last["eval/loss"]
    assert last["eval/loss"] < max(last[f"eval/loss/{name}"] for name in sources)
    assert "a: 50.00%" in printed and "c: 25.00%" in printed
    report = (workdir / "report.html").read_text()
    assert "eval a" in report and "train c" in report
    assert last["train/packing_efficiency"] > 0.85


def test_evaluation_has_the_means_of_every_source_and_of_all_rows():
    def sums(*pairs):
        return [{"loss": np.float32([total]), "weight": np.float32([weight])} for total, weight in pairs]

    parts = {"a": sums((6, 2), (2, 2)), "b": sums((10, 1)), "c": sums((3, 3), (9, 9), (100, 1))}
    held_out = types.SimpleNamespace(
        config=Config().replace(eval={"max_batches": 2}),
        mesh=make_mesh(Config().mesh, jax.devices()[:1]),
        eval_batches_by_source=lambda source: {name: iter(batches) for name, batches in parts.items()},
    )

    def eval_step(params, batch):
        return {"loss": (batch["loss"].sum(), batch["weight"].sum())}

    assert evaluate(held_out, eval_step, None) == {
        "eval/loss": 30 / 17,  # of all tokens, no mean of means; the third batch of c is beyond the limit
        "eval/loss/a": 2.0,
        "eval/loss/b": 10.0,
        "eval/loss/c": 1.0,
    }
    parts = {"a": parts["a"]}
    assert evaluate(held_out, eval_step, None) == {"eval/loss": 2.0}


def test_packing_efficiency_is_the_part_that_is_not_padding():
    batch = {"encoder_segments": jnp.array([[1, 1, 2, 0]]), "decoder_segments": jnp.array([[1, 0]])}
    tokens, places = packing_efficiency(batch | {"encoder_tokens": jnp.ones((1, 4), jnp.int32)})
    assert (float(tokens), float(places)) == (4, 6)


@pytest.mark.slow
def test_the_part_of_rows_that_is_not_padding_is_written(tmp_path):
    records = [{"text": "x" * (4 if i % 2 else 8), "label": i % 2} for i in range(16)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = f"jsonl:{tmp_path}/r.jsonl"
    config = classifier(source, eval=source, length=16, shuffle=False)
    config = config.replace(**{name: section for name, section in TINY.items() if name != "data"})
    train(config, tmp_path / "run", console=Console(quiet=True), devices=jax.devices()[:1])
    # Eight records a batch, in order: 6 tokens of text a record on average, and two special ones, in rows of 16.
    assert read_metrics(tmp_path / "run")[-1]["train/packing_efficiency"] == 8 / 16


def classifier(source, **data):
    return Config().replace(
        model={"architecture": "encoder", "heads": ("classification",), "num_classes": 2},
        objective={"name": "classification"},
        data={"train": source} | data,
    )


@pytest.mark.parametrize(
    ("source", "fields", "pair"),
    [
        ("tfds:glue/mrpc@train[:90%]", {}, "pair"),
        ("0.5*tfds:glue/rte + 0.5*tfds:glue/mrpc", {}, "pair"),
        ("tfds:glue/sst2", {}, ""),
        ("tfds:glue/mrpc", {"text_field": "sentence1"}, ""),
        ("tfds:glue/mrpc", {"pair_field": "sentence2"}, "sentence2"),
        ("jsonl:glue/mrpc", {}, ""),
    ],
)
def test_well_known_pairs_are_read_as_pairs_unless_fields_are_named(source, fields, pair):
    assert with_pairs(classifier(source, **fields)).data.pair_field == pair


def test_pairs_and_single_texts_do_not_mix():
    with pytest.raises(ConfigError, match="mixes pairs of texts and single texts"):
        with_pairs(classifier("tfds:glue/mrpc + tfds:glue/sst2"))


def test_classes_have_the_names_that_the_source_knows(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    for folder, names in (("words", ["no", "maybe"]), ("digits", ["2", "1"])):
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features).save_to_disk(folder)
    assert resolve(classifier("hf:words"), ByteTokenizer()).data.labels == ("no", "maybe")  # in the source's order
    assert resolve(classifier("hf:digits"), ByteTokenizer()).data.labels == ("0", "1")  # "1" would be both
