"""Short runs of tiny models on any mesh, for tests that compare them."""

import dataclasses

import jax
import numpy as np
from rich.console import Console

from lmx.config import Config, Data, Mesh, Model, Objective, Optimizer, Train
from lmx.models.transformer import Transformer
from lmx.objectives import make_objective
from lmx.parallel.mesh import split_batch
from lmx.parallel.sharding import Layout, put_batch
from lmx.training.experiment import Experiment
from lmx.training.initial import initial_state
from lmx.training.loop import compiled_eval_step, compiled_train_step

ROWS, LENGTH, STEPS = 8, 16, 3


@dataclasses.dataclass
class Ids:
    """The part of a tokenizer that objectives ask for."""

    vocab_size: int = 32
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    unk_id: int = 3
    mask_id: int = 4
    cls_id: int = 1
    sep_id: int = 2
    sentinel_ids: tuple = ()
    special_ids: frozenset = frozenset(range(5))


def make_config(architecture="decoder", **model):
    objective = {"decoder": "causal", "encoder": "mlm", "encoder_decoder": "seq2seq"}[architecture]
    heads = ("mlm",) if architecture == "encoder" else ("lm",)
    settings = dict(num_layers=2, num_heads=4, embed_dim=32, mlp_dim=64, vocab_size=32, max_length=LENGTH)
    return Config(
        model=Model(architecture=architecture, heads=heads, **(settings | model)),
        objective=Objective(name=objective),
        data=Data(length=LENGTH, target_length=LENGTH),
        train=Train(steps=STEPS, global_batch_size=ROWS),
        optimizer=Optimizer(learning_rate=1e-2, warmup_steps=1),
    )


def make_batch(config, seed=0):
    """Rows of unequal length, so that a mean of means would be wrong; two documents in each."""
    rng = np.random.default_rng(seed)
    lengths = np.linspace(LENGTH, 3, ROWS).astype(int)
    filled = np.arange(LENGTH) < lengths[:, None]
    segments = np.where(filled, 1 + (np.arange(LENGTH) >= lengths[:, None] // 2), 0)
    batch = {}
    for prefix in ("encoder_", "decoder_") if config.model.architecture == "encoder_decoder" else ("",):
        batch |= {
            f"{prefix}tokens": rng.integers(5, 32, (ROWS, LENGTH)) * filled,
            f"{prefix}targets": rng.integers(5, 32, (ROWS, LENGTH)) * filled,
            f"{prefix}segments": segments,
            f"{prefix}positions": np.broadcast_to(np.arange(LENGTH), (ROWS, LENGTH)),
        }
        batch = {name: array.astype(np.int32) for name, array in batch.items()}
        weights = filled & (rng.random(filled.shape) < 0.15) if config.objective.name == "mlm" else filled
        batch[f"{prefix}weights"] = weights.astype(np.float32)
    return batch


def run(config, mesh_config=None, devices=1, strategy="pjit", platform=None, **train):
    """Parameters and metrics after a few steps."""
    config = config.replace(train=train | {"strategy": strategy})
    layout = Layout.of(mesh_config or Mesh(), jax.devices(platform)[:devices])
    experiment = make_experiment(config, layout)
    optimizer = experiment.optimizer()
    state, _ = initial_state(experiment, optimizer, None, Console(quiet=True))
    train_step = compiled_train_step(experiment, optimizer, state)
    eval_step = compiled_eval_step(experiment, jax.tree.map(lambda x: x.sharding, state.params))
    history = []
    for seed in range(STEPS):
        state, metrics = train_step(state, put_batch(make_batch(config, seed), layout.mesh))
        history.append(jax.device_get(metrics))
    history.append(jax.device_get(eval_step(state.params, put_batch(make_batch(config), layout.mesh))))
    return jax.device_get(state.params), history


def make_experiment(config, layout):
    objective, split = make_objective(config, Ids()), split_batch(config.train, layout.mesh)
    return Experiment(config, config, Ids(), objective, Transformer(config.model), layout, split)
