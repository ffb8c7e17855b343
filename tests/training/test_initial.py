"""Parameters of another run go straight to their places on this run's mesh, however its layers were kept."""

import dataclasses

import jax
import numpy as np
import pytest
from rich.console import Console

from lmx.config import Mesh
from lmx.models.stack import unroll_params
from lmx.parallel.sharding import Layout
from lmx.training.checkpoints import Checkpoints
from lmx.training.initial import initial_state, state_layout
from tests.training.runs import make_config, make_experiment

QUIET = Console(quiet=True)


def experiment_of(scan_layers, mesh=None, devices=1, **train):
    config = make_config(scan_layers=scan_layers, tie_embeddings=False).replace(train=train)
    return make_experiment(config, Layout.of(mesh or Mesh(), jax.devices()[:devices]))


@pytest.mark.parametrize("scanned", [True, False])
def test_another_runs_parameters_go_straight_to_their_places(scanned, tmp_path, monkeypatch):
    before = experiment_of(scanned)
    before = dataclasses.replace(before, config=before.config.replace(seed=1))
    started, _ = initial_state(before, before.optimizer(), None, QUIET)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, started, {}, {})
    wanted, restore = [], Checkpoints.restore_params

    def recorded(self, abstract_params=None, step=None):
        wanted.extend(jax.tree.leaves(abstract_params))
        return restore(self, abstract_params, step)

    monkeypatch.setattr(Checkpoints, "restore_params", recorded)
    experiment = experiment_of(True, Mesh(data=1, fsdp=4, tensor=2), 8, init_from=str(tmp_path))
    state, _ = initial_state(experiment, experiment.optimizer(), None, QUIET)
    for leaf, asked in zip(jax.tree.leaves(state), jax.tree.leaves(state_layout(experiment)), strict=True):
        assert leaf.sharding.is_equivalent_to(asked.sharding, leaf.ndim)
    largest = max(wanted, key=lambda leaf: leaf.size)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in wanted)  # every device, so every process, has its part
    assert np.prod(largest.sharding.shard_shape(largest.shape)) == largest.size / 8
    found, expected = (unroll_params(jax.device_get(params)) for params in (state.params, started.params))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
