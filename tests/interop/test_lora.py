"""Low-rank adapters: where they are, that they start as nothing, are alone in being trained, and merge exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmx.config import Lora, Optimizer
from lmx.interop.files import open_tensors
from lmx.interop.pretrained import load_params, model_config, read_config
from lmx.models.lora import ADAPTERS, merge_adapters
from lmx.models.transformer import Transformer
from lmx.training.optimizers import make_optimizer
from tests.interop import zoo
from tests.interop.test_families import batch_of, opened

LORA = Lora(rank=3, alpha=6.0, targets=("attention/query", "attention/out", "mlp/in"))


def names(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def with_adapters(variant, folder, scan=True):
    plain = opened(variant, folder, scan_layers=scan)
    model = dataclasses.replace(plain.model, lora=LORA)
    params, report = load_params(folder, read_config(folder), open_tensors(folder), model)
    return plain, model, params, report


@pytest.mark.parametrize("variant", zoo.few(["bert-mlm", "gpt2", "t5", "llama3"], "bert-mlm", "t5"))
@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_adapters_start_as_nothing_and_merge_exactly(variant, scan, tmp_path):
    plain, model, params, report = with_adapters(variant, tmp_path, scan)
    batch, head = batch_of(model, zoo.inputs(plain.theirs)), f"{model.heads[0]}_logits"
    assert {name.rsplit("/", 1)[1] for name in report.fresh} == set(ADAPTERS)
    assert {name.rsplit("/", 2)[-2] for name in report.fresh} == {"query", "out", "in"}
    expected = Transformer(plain.model).apply({"params": plain.params}, batch)[head]
    np.testing.assert_allclose(Transformer(model).apply({"params": params}, batch)[head], expected, atol=2e-6)

    rng = np.random.default_rng(0)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32) if path[-1].key in ADAPTERS else leaf
        ),
        params,
    )
    found = Transformer(model).apply({"params": moved}, batch)[head]
    assert np.abs(np.asarray(found - expected)).max() > 0.01
    merged, without = merge_adapters(moved, model)
    assert jax.tree.structure(merged) == jax.tree.structure(plain.params) and without.lora.rank == 0
    np.testing.assert_allclose(Transformer(without).apply({"params": merged}, batch)[head], found, atol=2e-5)


def test_an_adapter_is_the_papers_product(tmp_path):
    _, model, params, _ = with_adapters("llama3", tmp_path, scan=False)
    node = dict(params["decoder"]["layers_0"]["mlp"]["in"])
    node["lora_b"] = jnp.ones_like(node["lora_b"])
    merged, _ = merge_adapters({"in": node}, model)
    expected = node["kernel"] + 6.0 / 3 * node["lora_a"] @ node["lora_b"]
    np.testing.assert_allclose(merged["in"]["kernel"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("variant", "heads", "lora", "trained"),
    [
        ("bert-mlm", ("classification",), LORA, "heads/classification/"),
        ("pythia", ("lm",), LORA, None),  # an output layer that is not tied stays as it is
        ("pythia", ("lm",), dataclasses.replace(LORA, heads=("lm",)), "heads/lm/"),
    ],
)
def test_only_adapters_and_the_heads_that_are_named_are_trained(variant, heads, lora, trained, tmp_path):
    zoo.make(variant).save_pretrained(tmp_path)
    config, tensors = read_config(tmp_path), open_tensors(tmp_path)
    model = dataclasses.replace(model_config(config, tensors, heads), lora=lora)
    params, _ = load_params(tmp_path, config, tensors, model)
    optimizer = make_optimizer(Optimizer(learning_rate=0.1, warmup_steps=0), 10, params, lora)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    changed = names(jax.tree.map(lambda a, b: bool((a != b).any()), optax.apply_updates(params, updates), params))
    ends, starts = tuple(ADAPTERS), trained or "nothing"
    assert changed == {name: name.endswith(ends) or name.startswith(starts) for name in changed}
    assert sum(changed.values()) > 4
    assert any(name.startswith("heads/") for name in changed)
