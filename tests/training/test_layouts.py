"""One config, any product of mesh axes, the same numbers as on one device; and nothing large is kept whole."""

import dataclasses

import jax
import numpy as np
import pytest
from rich.console import Console

from lmx.config import Experts, Mesh
from lmx.parallel.sharding import Layout, put_batch
from lmx.training.initial import initial_state, state_layout
from lmx.training.loop import compiled_train_step
from lmx.training.optimizers import eval_params

from .runs import make_batch, make_config, make_experiment

STEPS = 5
WIDTHS = dict(num_layers=8, num_heads=8, embed_dim=64, mlp_dim=64)
UNEVEN = dict(num_layers=2, num_heads=3, head_dim=10, embed_dim=36, mlp_dim=50, vocab_size=37)
MODELS = {
    "decoder": make_config(**WIDTHS),
    "encoder": make_config("encoder", **WIDTHS),
    "encoder_decoder": make_config("encoder_decoder", **WIDTHS, position="relative"),
    "switch": make_config(
        **(WIDTHS | {"num_layers": 16}),
        experts=Experts(num_experts=8, jitter=0.0, capacity_factor=1.0, z_loss_weight=0.1),
    ),
    "uneven": make_config(**UNEVEN, norm_position="post", tie_embeddings=False),
    "uneven_encoder": make_config("encoder", **UNEVEN),
}
ALONE = [{axis: 8} for axis in ("data", "fsdp", "tensor", "sequence", "expert", "stage")]
PRODUCTS = [
    {"data": 2, "fsdp": 4},
    {"data": 4, "tensor": 2},
    {"fsdp": 2, "tensor": 4},
    {"fsdp": 4, "sequence": 2},
    {"sequence": 4, "tensor": 2},
    {"fsdp": 2, "expert": 4},
    {"stage": 2, "data": 4},
    {"stage": 4, "tensor": 2},
    {"stage": 2, "data": 2, "fsdp": 2},
    {"stage": 2, "expert": 2, "tensor": 2},
    {"fsdp": 2, "sequence": 2, "tensor": 2},
    {"data": 2, "expert": 2, "sequence": 2},
    {"stage": 2, "sequence": 2, "fsdp": 2},
]
UNEVEN_SIZES = [{"tensor": 8}, {"fsdp": 2, "tensor": 4}, {"stage": 2, "tensor": 4}, {"expert": 2, "sequence": 4}]
EVERYDAY = {
    "decoder": [{"stage": 4, "tensor": 2}],
}
SLOW = {
    "decoder": ALONE,
    "encoder": [{"sequence": 8}, {"fsdp": 2, "sequence": 2, "tensor": 2}],
    "encoder_decoder": [{"stage": 8}, {"stage": 2, "sequence": 2, "fsdp": 2}],
    "switch": [{"expert": 8}, {"stage": 2, "expert": 2, "tensor": 2}, {"fsdp": 2, "expert": 4}],
    "uneven": UNEVEN_SIZES,
}


def cases():
    """Every model on every mesh: a few each day, more where CI has time, all of them when asked for."""
    for name in MODELS:
        for sizes in UNEVEN_SIZES if name.startswith("uneven") else ALONE + PRODUCTS:
            marks = [pytest.mark.slow if sizes in SLOW.get(name, ()) else pytest.mark.exhaustive]
            marks = [] if sizes in EVERYDAY.get(name, ()) else marks
            yield pytest.param(name, sizes, id=f"{name}-{label(sizes)}", marks=marks)


def label(sizes):
    return "x".join(f"{axis}{size}" for axis, size in sizes.items())


def five_steps(config, layout):
    """The states after the first step and the fifth, and the loss of every step.

    Momentum's state after the first step is the gradient.
    """
    optimizer = {"name": "sgd", "learning_rate": 0.1, "clip_norm": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    experiment = make_experiment(config.replace(optimizer=optimizer), layout)
    optimizer = experiment.optimizer()
    state, _ = initial_state(experiment, optimizer, None, Console(quiet=True))
    step = compiled_train_step(experiment, optimizer, state)
    states, losses = [jax.device_get(state)], []
    for seed in range(STEPS):
        state, metrics = step(state, put_batch(make_batch(config, seed), layout.mesh))
        losses.append(jax.device_get(metrics["loss"]))
        states.append(jax.device_get(state))
    return states[0], states[1], states[-1], losses


_ALONE = {}


def on_one_device(name):
    """The run to compare with, computed once in a process."""
    if name not in _ALONE:
        _ALONE[name] = five_steps(MODELS[name], Layout.of(Mesh(), jax.devices()[:1]))
    return _ALONE[name]


def assert_close(found, expected):
    """Within 1e-5 of the largest value of each array; of the tree where an array is but rounding noise."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected) if leaf.dtype.kind == "f")
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        scale = max(np.abs(b).max(), 1e-3 * largest)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(("name", "sizes"), list(cases()))
def test_any_mesh_gives_the_numbers_of_one_device(name, sizes):
    sizes = {"data": 1} | sizes
    start, first, last, losses = five_steps(MODELS[name], Layout.of(Mesh(**sizes), jax.devices()))
    expected_start, expected_first, expected_last, expected_losses = on_one_device(name)
    assert_close(start.params, expected_start.params)
    assert_close(first.opt_state, expected_first.opt_state)  # the gradient
    assert_close(last, expected_last)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), last.params, start.params)
    assert max(jax.tree.leaves(moved)) > 1e-2  # far more than what may differ


def strategies():
    for name in ("decoder", "encoder", "encoder_decoder", "switch"):
        for strategy, devices in (("jit", 1), ("pmap", 8), ("pjit", 1)):
            yield pytest.param(name, strategy, devices, marks=pytest.mark.slow)


@pytest.mark.parametrize(("name", "strategy", "devices"), list(strategies()))
def test_every_strategy_gives_the_same_numbers(name, strategy, devices):
    config = MODELS[name].replace(train={"strategy": strategy})
    _, first, last, losses = five_steps(config, Layout.of(Mesh(), jax.devices()[:devices]))
    _, expected_first, expected_last, expected_losses = on_one_device(name)
    assert_close(first.opt_state, expected_first.opt_state)
    assert_close(last, expected_last)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)


@pytest.mark.parametrize("optimizer", [{"ema_decay": 0.9}, {"name": "schedule_free_adamw"}], ids=str)
def test_averages_in_the_hosts_memory_come_to_the_parameters(optimizer):
    averages = []
    for offload, devices in ((True, 8), (False, 1)):
        config = MODELS["uneven"].replace(optimizer=optimizer | {"offload": offload})
        experiment = make_experiment(config, Layout.of(Mesh(data=1, fsdp=devices), jax.devices()[:devices]))
        state, _ = initial_state(experiment, experiment.optimizer(), None, Console(quiet=True))
        averages.append(eval_params(state))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(averages[0])} == {"device"}
    assert_close(*map(jax.device_get, averages))


@pytest.mark.parametrize("sizes", [{"fsdp": 8}], ids=label)
def test_an_optimizer_in_the_hosts_memory_takes_the_same_steps(sizes):
    config, layout = MODELS["decoder"].replace(optimizer={"offload": True}), Layout.of(Mesh(data=1, **sizes))
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state_layout(make_experiment(config, layout)))}
    assert kinds == {"device", "pinned_host"}
    _, first, last, losses = five_steps(config, layout)
    _, expected_first, expected_last, expected_losses = on_one_device("decoder")
    assert_close(first.opt_state, expected_first.opt_state)
    assert_close(last, expected_last)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [pytest.param({"stage_rounds": 2}, marks=pytest.mark.slow), {"stage_rounds": 4, "stage_microbatches": 2}],
)
def test_rounds_and_microbatches_of_a_pipeline_change_nothing(changes):
    mesh = Mesh(data=4, stage=2, **changes)
    if changes.get("stage_microbatches"):
        mesh = dataclasses.replace(mesh, data=1, tensor=4)
    _, first, last, losses = five_steps(MODELS["decoder"], Layout.of(mesh, jax.devices()))
    _, expected_first, expected_last, expected_losses = on_one_device("decoder")
    assert_close(first.opt_state, expected_first.opt_state)
    assert_close(last, expected_last)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)


def shape_of(name, mesh, optimizer):
    """An experiment whose large parameters are a few MiB, with an odd vocabulary; nothing is computed."""
    model = dict(num_layers=8, num_heads=8, embed_dim=1024, mlp_dim=2048, vocab_size=1111, max_length=1024)
    experts = {"switch": {"num_experts": 8}}.get(name, {})
    architecture = "decoder" if name == "switch" else name
    config = make_config(architecture, **model, experts=Experts(**experts)).replace(optimizer={"name": optimizer})
    return make_experiment(config, Layout.of(mesh, jax.devices()))


@pytest.mark.parametrize("axis", ["fsdp", "tensor", "sequence", "expert", "stage"])
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("decoder", rule) for rule in ("lamb", "muon", "schedule_free_adamw")]
    + [("encoder", "adamw"), ("encoder_decoder", "adafactor"), ("switch", "adamw")],
)
def test_no_large_tensor_is_replicated(name, optimizer, axis):
    experiment = shape_of(name, Mesh(data=1, **{axis: 8}), optimizer)
    whole = [
        (jax.tree_util.keystr(path), leaf.shape, leaf.sharding.spec)
        for path, leaf in jax.tree.leaves_with_path(state_layout(experiment))
        if leaf.dtype.itemsize * leaf.size > 2**20 and np.prod(leaf.sharding.shard_shape(leaf.shape)) * 8 > leaf.size
    ]
    assert not whole


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"tensor": 8}, {"expert": 8}, {"stage": 8}, {"sequence": 8}], ids=label)
def test_the_compiled_step_keeps_it_so(sizes):
    experiment = shape_of("switch" if "expert" in sizes else "decoder", Mesh(data=1, **sizes), "adamw")
    state = state_layout(experiment)
    step = compiled_train_step(experiment, experiment.optimizer(), state)
    batch = put_batch(make_batch(experiment.config), experiment.mesh)
    compiled = step.lower(state, batch).compile()
    (inputs, _), _ = compiled.input_shardings
    outputs, _ = compiled.output_shardings
    for shardings in (inputs, outputs):
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
            if leaf.dtype.itemsize * leaf.size > 2**20:
                assert np.prod(sharding.shard_shape(leaf.shape)) * 8 <= leaf.size
