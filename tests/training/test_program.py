"""What the compiled train step holds and reuses: no logits of a whole batch, one copy of the state, one program."""

import re

import jax
import numpy as np
import pytest
from rich.console import Console

from lmx.config import Mesh
from lmx.kernels import linear_cross_entropy
from lmx.objectives.mlm import num_chosen
from lmx.parallel.sharding import Layout, put_batch
from lmx.training.initial import initial_state
from lmx.training.loop import compiled_eval_step, compiled_train_step

from .runs import LENGTH, ROWS, make_batch, make_config, make_experiment

VOCAB = 307  # no other size


def opened(config, devices=1, **mesh):
    """The train step, its state and a batch."""
    layout = Layout.of(Mesh(**mesh), jax.devices()[:devices])
    experiment = make_experiment(config, layout)
    optimizer = experiment.optimizer()
    state, _ = initial_state(experiment, optimizer, None, Console(quiet=True))
    return experiment, compiled_train_step(experiment, optimizer, state), state, layout


def largest_logits(text):
    """Most elements of a float32 array in a program that has the vocabulary among its dimensions."""
    shapes = re.findall(rf"f32\[((?:\d+,)*{VOCAB}(?:,\d+)*)\]", text)
    return max(np.prod([int(size) for size in shape.split(",")]) for shape in shapes)


@pytest.mark.parametrize(
    "architecture", ["decoder", "encoder", pytest.param("encoder_decoder", marks=pytest.mark.slow)]
)
def test_no_step_holds_the_logits_of_a_batch(architecture, monkeypatch):
    config = make_config(architecture, vocab_size=VOCAB, embed_dim=ROWS)  # a table is no larger than one place's logits
    texts = []
    for limit in (linear_cross_entropy.CHUNK_LOGITS, ROWS * VOCAB):  # all places of a row at once, and one
        monkeypatch.setattr(linear_cross_entropy, "CHUNK_LOGITS", limit)
        _, step, state, layout = opened(config)
        texts.append(step.lower(state, put_batch(make_batch(config), layout.mesh)).compile().as_text())
    places = num_chosen(LENGTH, config.objective.mask_rate) if architecture == "encoder" else LENGTH
    assert largest_logits(texts[0]) >= ROWS * places * VOCAB
    assert largest_logits(texts[1]) <= ROWS * VOCAB < largest_logits(texts[0])


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_the_new_state_takes_the_place_of_the_old_one(mesh):
    config = make_config()
    devices = int(np.prod(list(mesh.values())))
    _, step, state, layout = opened(config, devices, **mesh)
    batch = put_batch(make_batch(config), layout.mesh)
    found = step.lower(state, batch).compile().memory_analysis()
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert found.alias_size_in_bytes >= held > 10_000
    leaves = jax.tree.leaves(state)
    step(state, batch)
    assert all(leaf.is_deleted() for leaf in leaves)


def test_steps_after_the_first_find_it_compiled():
    config = make_config()
    experiment, step, state, layout = opened(config, 8, data=2, fsdp=2, tensor=2)
    evaluate = compiled_eval_step(experiment, jax.tree.map(lambda x: x.sharding, state.params))
    for seed in range(4):
        state, _ = step(state, put_batch(make_batch(config, seed), layout.mesh))
        evaluate(state.params, put_batch(make_batch(config, seed), layout.mesh))
    assert step.function._cache_size() == 1 and evaluate.function._cache_size() == 1
