"""The work of each case, done by lmx."""

import dataclasses
import functools
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from safetensors.numpy import load_file, save_file

import lmx
from lmx.allocator import compute_on_main_thread
from lmx.benchmarking.batches import random_batch
from lmx.benchmarking.cases import Case
from lmx.benchmarking.work import BATCH, BATCHES, Work, prompts_of
from lmx.config import Config, Model
from lmx.generation.forms import for_decoding
from lmx.generation.generate import generate
from lmx.interop.pretrained import load_params, open_checkpoint
from lmx.interop.writing import save_pretrained
from lmx.models.stack import to_layout
from lmx.models.transformer import Transformer, init_params
from lmx.parallel.sharding import put_batch
from lmx.planning.program import abstract_batch, abstract_experiment
from lmx.planning.targets import HERE, open_target
from lmx.text.corpora import open_source
from lmx.text.packing import token_store
from lmx.text.pipeline import BATCHES_AHEAD
from lmx.training.experiment import Experiment, record_fields
from lmx.training.initial import state_layout
from lmx.training.loop import compiled_train_step
from lmx.training.profiling import SHOWN, STEPS, newest_trace, operation_costs
from lmx.training.state import TrainState, init_state

PROGRAM = "program.txt"  # of a profile: the compiled step
compute_on_main_thread()


def prepare(case: Case, folder: Path) -> Callable[[], Work]:
    """Writes the model and what it reads to ``folder``, for all systems; what is returned gets ready for the work."""
    experiment = abstract_experiment(case.config, open_target(HERE))
    if case.kind == "input":
        _rows(experiment, folder)
        return functools.partial(_input, experiment)
    state = _initial_state(experiment)
    save_pretrained(folder, _published(case.config), state.params, {})
    if case.kind == "training":
        shapes = {name: x.shape for name, x in abstract_batch(experiment).items()}
        batch = random_batch(case.config, shapes, case.documents)
        save_file(batch, folder / BATCH)
        return functools.partial(_training, experiment, state, batch)
    if case.kind == "generation":
        params = jax.tree.map(lambda x: x.astype(case.config.model.dtype), state.params)
        return functools.partial(_generation, case, experiment, params)
    return lambda: Work(lambda: _load(folder, experiment))


def open_work(case: Case, folder: Path, system: str) -> Work:
    """Gets the case's twin ready, which reads what the case itself has left in ``folder``."""
    experiment = abstract_experiment(case.twin, open_target(HERE))
    return _training(experiment, _initial_state(experiment), load_file(folder / BATCH))


def _initial_state(experiment: Experiment) -> TrainState:
    """As a run has it; drawn with layers stacked, which compiles sooner, wherever the model has them apart."""
    config = experiment.config
    params = _drawing(dataclasses.replace(config.model, scan_layers=True))(jax.random.key(config.seed))
    shardings = jax.tree.map(lambda x: x.sharding, state_layout(experiment))
    optimizer = experiment.optimizer()
    return jax.jit(lambda p: init_state(to_layout(p, config.model), optimizer), out_shardings=shardings)(params)


@functools.cache
def _drawing(config: Model) -> Callable[[jax.Array], Any]:
    """Draws a model's parameters; compiled once for all cases that have the same model."""
    model = Transformer(config)
    return jax.jit(lambda key: nn.meta.unbox(init_params(model, key)))


def profile(work: Work, folder: Path) -> dict[str, float]:
    """Traces some turns into ``folder``; seconds of a turn in the operations that cost most, of a training step."""
    with jax.profiler.trace(str(folder)):
        for _ in range(STEPS):
            work.run()
    if work.program is None:
        return {}
    (folder / PROGRAM).write_text(work.program)
    costs = operation_costs(newest_trace(folder), work.program)
    return {name: seconds / STEPS for name, seconds in costs.most_common(SHOWN)}


def _published(config: Config) -> Model:
    """The model as transformers has it: an expert's capacity is a number there, whatever the length of a row.

    It is the encoder's; that of a shorter decoder is set beside it (:mod:`lmx.benchmarking.theirs`).
    """
    model, experts = config.model, config.model.experts
    if not experts.num_experts:
        return model
    return dataclasses.replace(
        model, experts=dataclasses.replace(experts, capacity=experts.slots(config.data.length, train=True))
    )


def reset_peak() -> None:
    """JAX has no way to."""


def peak_memory() -> float | None:
    """Most bytes that the device has held, in the cases before too; none where it does not tell (a CPU)."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else None


def free_memory() -> None:
    """JAX keeps its memory for the next case."""


def matmul_rate(size: int, dtype: str) -> float:
    """FLOP/s of one square matrix product, of random numbers: a GPU is faster at others, which change fewer bits."""
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(x))
    start = time.perf_counter()
    jax.block_until_ready(product(x))
    return 2 * size**3 / (time.perf_counter() - start)


def about() -> dict[str, str]:
    """What would have to be the same for the figures to be."""
    device = jax.devices()[0]
    cores = str(len(os.sched_getaffinity(0)))
    versions = {"lmx": _version(), "jax": jax.__version__}
    return {"platform": device.platform, "device": device.device_kind, "cores": cores} | versions


def _version() -> str:
    """Of lmx, and the commit where it is a checkout."""
    root = Path(lmx.__file__).parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return lmx.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    return f"{lmx.__version__} {subprocess.run(command, capture_output=True, text=True).stdout.strip()}".strip()


def _training(experiment: Experiment, state: Any, batch: dict[str, np.ndarray]) -> Work:
    batch = put_batch(batch, experiment.mesh)
    start = time.perf_counter()
    step = compiled_train_step(experiment, experiment.optimizer(), state).lower(state, batch).compile()
    compiling = time.perf_counter() - start
    held = [state]

    def run() -> float:
        held[0], metrics = step(held[0], batch)
        total, weight = jax.device_get(metrics["loss"])
        return float(total / weight)

    flops = 3 * experiment.config.train.global_batch_size * experiment.row_tokens_and_flops()[1]
    return Work(run, {"compile": compiling, "flops": flops}, program=step.as_text())


def _generation(case: Case, experiment: Experiment, params: Any) -> Work:
    prompts = prompts_of(case)
    model, params = for_decoding(experiment.model, params)  # as a LanguageModel does once

    def run(new_tokens: int = case.new_tokens) -> int:
        found = generate(model, params, prompts, max_new_tokens=new_tokens)
        return sum(map(len, found))

    return Work(run, first_token=lambda: run(1))


def _rows(experiment: Experiment, folder: Path) -> None:
    """Leaves the tokens of the built-in text for the others, cut into rows of the same length."""
    config = experiment.config
    source = open_source(config.data.train, record_fields(config))
    tokens = token_store(source, experiment.tokenizer, config.data.text_field).tokens
    rows = tokens[: len(tokens) // config.data.length * config.data.length].reshape(-1, config.data.length)
    save_file({"rows": rows}, folder / BATCH)


def _input(experiment: Experiment) -> Work:
    batches = experiment.train_batches()

    def run() -> int:
        for _ in range(BATCHES_AHEAD + 1):  # were made before the turn
            next(batches)
        return sum(next(batches)["tokens"].size for _ in range(BATCHES))

    return Work(run)


def _load(folder: Path, experiment: Experiment) -> float:
    config, tensors = open_checkpoint(folder)
    params, _ = load_params(folder, config, tensors, experiment.config.model, experiment.layout)
    return sum(float(leaf.sum()) for leaf in jax.tree.leaves(params))
