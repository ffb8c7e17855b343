"""``lmx eval``: a trained run on its held-out data or on other data, by the numbers that training reports."""

from pathlib import Path

import jax
from rich.console import Console

from lmx.errors import LmxError, nearest
from lmx.evaluation.unigram import unigram_loss
from lmx.paths import user_path
from lmx.training.checkpoints import Checkpoints
from lmx.training.experiment import build
from lmx.training.initial import state_layout
from lmx.training.loop import compiled_eval_step, evaluate
from lmx.training.workdir import read_config

TASKS = ("held_out", "unigram")


def evaluate_workdir(
    workdir: str | Path, *, source: str | None = None, task: str = "held_out", console: Console | None = None
) -> dict[str, float]:
    """Scores a run's newest checkpoint, each row of the data once.

    Args:
      workdir: the run.
      source: another source than the config's ``data.eval``.
      task: what to score; "held_out" is the objective's own terms, as during training, and "unigram" the loss of
        guessing by frequency, to compare with.
      console: where progress is printed.

    Returns:
      ``eval/loss`` and the objective's other terms by name.

    Raises:
      LmxError: an unknown task, no run in ``workdir``, or bad data.
    """
    if task not in TASKS:
        raise LmxError(f"there is no task {task!r}{nearest(task, TASKS)}")
    workdir = user_path(workdir).resolve()
    config = read_config(workdir)
    experiment = build(config, workdir, console or Console())
    if task == "unigram":
        return unigram_loss(experiment, source)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        layout = state_layout(experiment).params
        params = checkpoints.restore_params(layout)
    shardings = jax.tree.map(lambda x: x.sharding, layout)
    return evaluate(experiment, compiled_eval_step(experiment, shardings), params, source)
