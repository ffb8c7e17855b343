"""Stages: any number of microbatches and rounds computes what layer after layer computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.config import Mesh, Model
from lmx.errors import ConfigError
from lmx.parallel.pipeline import check_pipeline, pipelined, stage_microbatches
from lmx.parallel.sharding import Layout, use_layout

LAYERS, ROWS, WIDTH = 8, 8, 6


def layer(params, x, rows, shared, index, microbatch):
    """Not linear, and different for every layer, row and microbatch's row."""
    y = jnp.tanh(x @ params["w"] + rows["shift"][:, None] * shared + 0.1 * index)
    return x + y, {"mean": y.mean(1), "index": jnp.broadcast_to(index, y.shape[:1])}


def one_after_the_other(params, x, rows, shared):
    means = []
    for index in range(LAYERS):
        of_layer = jax.tree.map(lambda p, i=index: p[i], params)
        x, aux = layer(of_layer, x, rows, shared, jnp.int32(index), 0)
        means.append(aux["mean"])
    return x, jnp.stack(means)


@pytest.mark.parametrize(
    ("stages", "rounds", "microbatches"), [(2, 1, 2), (2, 1, 8), (2, 2, 2), (2, 4, 4), (4, 1, 4), (4, 2, 8), (8, 1, 8)]
)
def test_stages_rounds_and_microbatches_change_nothing(stages, rounds, microbatches):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(LAYERS, WIDTH, WIDTH)) / 3, jnp.float32)}
    x = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32)
    rows, shared = {"shift": jnp.asarray(rng.normal(size=ROWS), jnp.float32)}, jnp.float32(0.3)
    mesh = Mesh(data=1, fsdp=8 // stages, stage=stages, stage_rounds=rounds, stage_microbatches=microbatches)
    if 8 // stages * microbatches > ROWS:
        mesh = Mesh(data=1, tensor=8 // stages, stage=stages, stage_rounds=rounds, stage_microbatches=microbatches)
    layout = Layout.of(mesh, jax.devices())

    def outcome(run):
        def loss(params, x, rows, shared):
            y, means = run(params, x, rows, shared)
            return (y**2).sum() + (means * jnp.arange(1.0, 1 + means.size).reshape(means.shape)).sum(), (y, means)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(params, x, rows, shared)

    def staged(params, x, rows, shared):
        y, aux = pipelined(layer, params, x, rows, shared, layout)
        return y, aux["mean"]

    expected = outcome(one_after_the_other)
    with use_layout(layout):
        found = outcome(staged)
        _, aux = jax.jit(lambda *args: pipelined(layer, *args, layout))(params, x, rows, shared)
    np.testing.assert_array_equal(aux["index"], np.broadcast_to(np.arange(LAYERS)[:, None], (LAYERS, ROWS)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def layout_of(**sizes):
    return Layout.of(
        Mesh(**({"data": 1} | sizes)), jax.devices()[: np.prod([v for k, v in sizes.items() if "_" not in k])]
    )


@pytest.mark.parametrize(("rows", "expected"), [(2, 2), (8, 8), (6, 6), (12, 6), (16, 8), (7, 7)])
def test_as_many_microbatches_as_divide_the_rows(rows, expected):
    assert stage_microbatches(rows, layout_of(stage=2)) == expected


@pytest.mark.parametrize(
    ("rows", "sizes", "message"),
    [
        (1, {"stage": 2}, r"needs the 1 row\(s\).*at least 2 microbatches"),
        (8, {"stage": 2, "stage_microbatches": 3}, "stage_microbatches=3 must be at least mesh.stage"),
        (8, {"stage": 4, "stage_microbatches": 2}, "stage_microbatches=2 must be at least mesh.stage"),
    ],
)
def test_rows_that_do_not_split_say_so(rows, sizes, message):
    with pytest.raises(ConfigError, match=message):
        stage_microbatches(rows, layout_of(**sizes))


def test_layers_that_do_not_split_say_so():
    with pytest.raises(ConfigError, match=r"model.num_layers \(12\) makes 12 group\(s\).*mesh.stage=8"):
        check_pipeline(Model(num_layers=12), 8, layout_of(stage=8))
    with pytest.raises(ConfigError, match=r"makes 6 group\(s\) of 2, the period.*stage_rounds=2"):
        check_pipeline(Model(num_layers=12, attention_windows=(0, 8)), 8, layout_of(stage=2, stage_rounds=2))
    with pytest.raises(ConfigError, match="model.scan_layers=True"):
        check_pipeline(Model(scan_layers=False), 8, layout_of(stage=2))
    check_pipeline(Model(num_layers=12), 8, layout_of(stage=2, stage_rounds=2))
