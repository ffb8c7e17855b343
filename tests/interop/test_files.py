"""Files that are whole, in parts, damaged or strange, and what is said of them."""

import json
import warnings

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lmx
from lmx.config import Mesh
from lmx.errors import CheckpointError
from lmx.interop.families import family_of, head_of
from lmx.interop.files import open_tensors, write_tensors
from lmx.interop.layouts import Weight
from lmx.interop.pretrained import load_params, model_config, read_config
from lmx.parallel.sharding import Layout
from tests.interop import zoo
from tests.interop.test_families import opened

FILE = "model.safetensors"


def read(folder, num_classes=None):
    """The report of opening a folder."""
    config, tensors = read_config(folder), open_tensors(folder)
    heads = head_of(family_of(config["model_type"]), config)[1].heads
    model = model_config(config, tensors, heads if num_classes is None else ("classification",), num_classes or 2)
    return load_params(folder, config, tensors, model)


@pytest.fixture
def bert(tmp_path):
    zoo.make("bert-mlm").save_pretrained(tmp_path)
    return tmp_path


def edit(folder, change):
    """Rewrites the tensors of a folder."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


def test_shards_with_an_index_give_the_same_parameters(tmp_path):
    whole = opened("mixtral", tmp_path / "whole")
    whole.theirs.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    params, report = read(tmp_path / "parts")
    assert report.used == whole.report.used
    jax.tree.map(np.testing.assert_array_equal, params, whole.params)


def test_written_shards_are_read_back(tmp_path):
    tensors = {f"t{i}": np.full((10, 10), i, np.float32) for i in range(5)}
    write_tensors(tmp_path, iter(tensors.items()), shard_bytes=900)
    assert sorted(p.name for p in tmp_path.iterdir())[:2] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000 and index["weight_map"]["t4"] == "model-00003-of-00003.safetensors"
    found = open_tensors(tmp_path)
    for name, value in tensors.items():
        np.testing.assert_array_equal(found.read(name, (slice(0, 10), slice(0, 10))), value)


def test_pytorchs_files_are_read_without_running_what_is_in_them(tmp_path, bert):
    expected, _ = read(bert)
    torch.save(load_file(bert / FILE), bert / "pytorch_model.bin")
    (bert / FILE).unlink()
    jax.tree.map(np.testing.assert_array_equal, read(bert)[0], expected)

    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"weight": Evil()}, bert / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no file of plain tensors"):
        read(bert)


def test_names_of_old_checkpoints_are_understood(bert):
    expected, _ = read(bert)

    def age(tensors):
        for name in [name for name in tensors if "LayerNorm" in name]:
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
        tensors["bert.embeddings.position_ids"] = torch.arange(64)[None]

    edit(bert, age)
    params, report = read(bert)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert report.ignored == {
        "cls.predictions.decoder.weight": "a copy of bert.embeddings.word_embeddings.weight",
        "bert.embeddings.position_ids": "a buffer of 0, 1, 2, …",
    }


def test_an_output_layer_that_differs_is_not_tied(bert):
    def untie(tensors):
        tensors["cls.predictions.decoder.weight"] = torch.ones(zoo.VOCAB, 32)

    edit(bert, untie)
    params, _ = read(bert)
    np.testing.assert_array_equal(params["heads"]["mlm"]["vocabulary"]["output"]["kernel"], np.ones((32, zoo.VOCAB)))


def test_other_heads_are_named_and_a_fresh_classifier_too(bert):
    _, report = read(bert, num_classes=5)
    reason = "part of a head that this model does not have (it has classification)"
    assert report.ignored["cls.predictions.transform.dense.weight"] == reason
    assert set(report.fresh) == {
        f"heads/classification/{layer}/{leaf}" for layer in ("pooler/dense", "output") for leaf in ("bias", "kernel")
    }


def nan(tensors):
    tensors["bert.encoder.layer.1.output.dense.bias"][3] = float("nan")


def shape(tensors):
    tensors["bert.encoder.layer.0.intermediate.dense.bias"] = torch.zeros(7)


def missing(tensors):
    del tensors["bert.encoder.layer.1.attention.self.key.weight"]


def strange(tensors):
    tensors["bert.encoder.layer.1.adapter.weight"] = torch.zeros(2)


@pytest.mark.parametrize(
    "change, message",
    [
        (nan, r"tensor bert.encoder.layer.1.output.dense.bias of .*model.safetensors holds NaN"),
        (shape, r"layer.0.intermediate.dense.bias of .* has shape \[7\], but config.json makes it \[48\]"),
        (missing, r"lacks the tensor bert.encoder.layer.1.attention.self.key.weight"),
        (strange, r"bert.encoder.layer.1.adapter.weight of .* has no place in the model"),
    ],
)
def test_bad_tensors_are_named(change, message, bert):
    edit(bert, change)
    with pytest.raises(CheckpointError, match=message):
        read(bert)


def test_damaged_folders_are_told_apart(bert, tmp_path):
    whole = (bert / FILE).read_bytes()
    (bert / FILE).write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or cut short"):
        read(bert)
    (bert / FILE).unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        read(bert)
    (bert / f"{FILE}.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match="names shards that are not there: model-00001-of-00002.safetensors"):
        read(bert)
    (bert / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is no config.json of a published checkpoint"):
        read(bert)


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 4, "tensor": 2}])
@pytest.mark.parametrize(
    "variant", zoo.few(["bert-mlm", "gpt2", "pythia", "t5", "switch", "llama3", "mixtral"], "gpt2", "switch")
)
def test_a_mesh_gets_the_same_parameters(variant, axes, tmp_path):
    alone = opened(variant, tmp_path)
    spread = opened(variant, tmp_path, layout=Layout.of(Mesh(**axes)))
    jax.tree.map(np.testing.assert_array_equal, spread.params, alone.params)
    kernels = [leaf for leaf in jax.tree.leaves(spread.params) if leaf.size > 1000]
    assert sum(leaf.addressable_shards[0].data.size < leaf.size for leaf in kernels) > len(kernels) / 2


def test_only_the_wanted_part_of_a_tensor_is_read():
    tensor, asked = np.arange(3 * 4 * 5 * 6).reshape(60, 6), []

    def read(name, index):
        asked.append(index)
        return tensor[index]

    weight = Weight("ours", "theirs", "(3 heads head_dim) embed -> embed heads head_dim", part=1)
    index = (slice(2, 4), slice(1, 3), slice(0, 5))
    found = weight.read(read, (6, 4, 5), index, np.dtype(np.int64))
    np.testing.assert_array_equal(found, tensor.reshape(3, 4, 5, 6)[1].transpose(2, 0, 1)[index])
    assert asked == [(slice(25, 35), slice(2, 4))]


def test_another_number_of_classes_is_a_fresh_output_layer(tmp_path):
    zoo.make("bert-classifier").save_pretrained(tmp_path)  # of three classes
    config, tensors = read_config(tmp_path), open_tensors(tmp_path)
    for classes in (3, 5):
        _, report = load_params(tmp_path, config, tensors, model_config(config, tensors, ("classification",), classes))
        named = {f"heads/classification/output/{leaf}" for leaf in ("kernel", "bias")} if classes == 5 else set()
        assert set(report.fresh) == named
        assert report.ignored.get("classifier.weight") == (
            "it has 3 classes, and this model 5" if classes == 5 else None
        )


def test_load_warns_of_what_is_fresh(bert):
    with pytest.warns(UserWarning, match="heads/classification/output/kernel.*: not in"), warnings.catch_warnings():
        (bert / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film"]) + "\n")
        lm = lmx.load(bert, num_classes=2)
    assert lm.labels == ("LABEL_0", "LABEL_1")
    assert lm.predict("a film")["label"] in lm.labels
