"""The one step gives the same numbers however it is compiled, split or laid out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from lmx.config import Experts, Lora, Mesh
from lmx.models.transformer import Transformer
from lmx.parallel.sharding import Layout, put_batch, use_layout
from lmx.training.initial import initial_state, state_layout
from lmx.training.loop import compiled_train_step
from lmx.training.optimizers import make_schedule
from lmx.training.step import loss_terms, make_train_step

from .runs import ROWS, STEPS, make_batch, make_config, make_experiment, run


def assert_same(found, expected):
    (params, history), (params_expected, history_expected) = found, expected
    for a, b in zip(jax.tree.leaves(history), jax.tree.leaves(history_expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # Adam divides by the root of squared gradients: where those are rounding noise, so is the direction.
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(params_expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)


ARCHITECTURES = {
    "decoder": make_config(),
    "encoder": make_config("encoder"),
    "encoder_decoder": make_config("encoder_decoder"),
    "switch": make_config(experts=Experts(num_experts=4, jitter=0.0, capacity_factor=1.0, z_loss_weight=0.1)),
    "adapters": make_config("encoder", lora=Lora(rank=4)),
}


def other(*values):
    """Of the cases of a test those that are left to the slow suite."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("rows_at_once", [*other(1, 2), 4])
@pytest.mark.parametrize("name", ["decoder", *other("encoder", "encoder_decoder", "adapters", "switch")])
def test_any_split_into_microbatches_equals_the_whole_batch(name, rows_at_once):
    config = ARCHITECTURES[name]
    assert_same(run(config, max_rows_per_device=rows_at_once), run(config))


# data, fsdp, tensor
SPLITS = [(1, 8, 1), (2, 2, 2), *other((8, 1, 1), (1, 2, 4), (2, 1, 4), (4, 2, 1), (1, 4, 2), (1, 1, 8))]


@pytest.mark.parametrize("sizes", SPLITS)
def test_eight_devices_in_any_split_equal_one(sizes):
    config = ARCHITECTURES["decoder"]
    assert_same(run(config, Mesh(*sizes), devices=8), run(config))


@pytest.mark.parametrize("name", [*other("encoder", "encoder_decoder", "adapters"), "switch"])
def test_every_architecture_on_a_mesh_of_all_axes_equals_one_device(name):
    assert_same(run(ARCHITECTURES[name], Mesh(2, 2, 2), devices=8), run(ARCHITECTURES[name]))


def test_micro_batches_on_a_mesh_equal_one_device():
    config = ARCHITECTURES["decoder"]
    assert_same(run(config, Mesh(2, 2, 2), devices=8, max_rows_per_device=1), run(config))


@pytest.mark.parametrize(
    ("strategy", "devices"), [("jit", 1), pytest.param("pmap", 1, marks=pytest.mark.slow), ("pmap", 8)]
)
def test_every_strategy_gives_the_same_numbers(strategy, devices):
    config = ARCHITECTURES["decoder"]
    assert_same(run(config, devices=devices, strategy=strategy), run(config))


def test_what_is_frozen_costs_no_gradient_and_the_rest_moves_as_before():
    config = ARCHITECTURES["adapters"]
    experiment = make_experiment(config, Layout.of(Mesh(), jax.devices()[:1]))
    optimizer, schedule = experiment.optimizer(), make_schedule(config.optimizer, STEPS)
    state, _ = initial_state(experiment, optimizer, None, Console(quiet=True))
    batch = jax.tree.map(jnp.asarray, make_batch(config))
    mask = experiment.trainable()
    parts = (experiment.model, experiment.objective, optimizer, schedule)
    some, every = (
        jax.jit(make_train_step(*parts, trainable=kept)).lower(state, batch).compile() for kept in (mask, None)
    )
    # Of the three products of a dense layer (forward, to its input, to its kernel) the last is not needed.
    assert some.cost_analysis()["flops"] < 0.85 * every.cost_analysis()["flops"]
    (found, metrics), (expected, _) = some(state, batch), every(state, batch)
    for kept, start, a, b in zip(
        *map(jax.tree.leaves, (mask, state.params, found.params, expected.params)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert kept or np.array_equal(a, start)
    gradients = jax.grad(lambda p: loss_of(experiment, p, batch))(state.params)
    squares = jax.tree.map(lambda kept, g: kept * jnp.square(g).sum(), mask, gradients)
    np.testing.assert_allclose(metrics["grad_norm"][0], np.sqrt(sum(jax.tree.leaves(squares))), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "strategy", "mesh", "devices"),
    [
        ("decoder", "pjit", Mesh(), 1),
        pytest.param("switch", "pjit", Mesh(2, 2, 2), 8, marks=pytest.mark.slow),
        pytest.param("decoder", "pmap", Mesh(), 8, marks=pytest.mark.slow),
    ],
)
def test_a_batch_that_is_not_finite_changes_nothing_but_the_step(name, strategy, mesh, devices):
    config = ARCHITECTURES[name].replace(train={"on_nan": "skip", "strategy": strategy})
    layout = Layout.of(mesh, jax.devices()[:devices])
    experiment = make_experiment(config, layout)
    state, _ = initial_state(experiment, experiment.optimizer(), None, Console(quiet=True))
    train_step = compiled_train_step(experiment, experiment.optimizer(), state)
    good = make_batch(config)
    bad = good | {"weights": np.where(np.arange(ROWS)[:, None] == 1, np.float32("nan"), good["weights"])}
    state, metrics = train_step(state, put_batch(good, layout.mesh))
    assert metrics["skipped"] == (0, 1) and metrics["loss"][1] > 0
    before = jax.device_get(state)  # the step reuses its memory
    state, metrics = train_step(state, put_batch(bad, layout.mesh))
    after = jax.device_get(state)
    assert (after.step, before.step) == (2, 1)
    for a, b in zip(
        *map(jax.tree.leaves, ((after.params, after.opt_state), (before.params, before.opt_state))), strict=True
    ):
        assert a.tobytes() == b.tobytes()
    assert metrics.pop("skipped") == (1, 1)
    assert all(value == 0 for value in jax.tree.leaves(jax.device_get(metrics)))
    state, metrics = train_step(state, put_batch(good, layout.mesh))
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), jax.device_get(state.params), before.params)
    assert metrics["skipped"] == (0, 1) and all(jax.tree.leaves(moved))


def loss_of(experiment, params, batch):
    total, _ = loss_terms(experiment.model, experiment.objective, params, batch, None)["loss"]
    return total / experiment.objective.weights(batch)["loss"]


def test_dropout_does_not_depend_on_the_mesh():
    # Adam divides a gradient by itself: of one that is only rounding it makes a whole step, unless epsilon is more.
    config = make_config(dropout=0.2, attention_dropout=0.2).replace(optimizer={"epsilon": 1e-4})
    found, expected = run(config, Mesh(2, 2, 2), devices=8), run(config)
    assert_same(found, expected)
    loss = [history[0]["loss"][0] for _, history in (found, run(ARCHITECTURES["decoder"]))]
    assert abs(loss[0] - loss[1]) > 1e-2  # and it does something


def test_the_loss_is_the_mean_over_tokens_not_over_rows():
    config = ARCHITECTURES["decoder"]
    params, history = run(config)
    params, batch = jax.tree.map(jnp.asarray, (params, make_batch(config)))
    model = Transformer(config.model)
    logits = model.apply({"params": params}, batch)["lm_logits"]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    total, weight = history[-1]["loss"]
    np.testing.assert_allclose(total / weight, (nll * batch["weights"]).sum() / batch["weights"].sum(), rtol=1e-5)


def test_constraints_and_shardings_reach_the_program():
    config = ARCHITECTURES["decoder"]
    layout = Layout.of(Mesh(2, 2, 2), jax.devices())
    experiment = make_experiment(config, layout)
    schedule = make_schedule(config.optimizer, STEPS)
    step = make_train_step(experiment.model, experiment.objective, experiment.optimizer(), schedule)
    state = state_layout(experiment)
    batch = put_batch(make_batch(config), layout.mesh)
    with use_layout(layout):
        text = jax.jit(step).lower(state, batch).as_text()
    assert text.count("sdy.sharding_constraint") >= 4
    query = state.params["decoder"]["layers"]["block_0"]["attention"]["query"]["kernel"]
    assert query.sharding.spec == jax.P(None, ("fsdp",), ("tensor",), None)
    # Two moments each of query, key and value, which have one shape.
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == query.shape]
    assert len(moments) == 6 and all(x.sharding == query.sharding for x in moments)
