"""The baseline that every language model must beat: guessing each token by how often it occurs."""

import numpy as np

from lmx.errors import LmxError
from lmx.training.experiment import Experiment


def unigram_loss(experiment: Experiment, source: str | None = None) -> dict[str, float]:
    """Cross-entropy of the held-out targets under the training targets' frequencies, in nats a token.

    Every token of the vocabulary is counted once more than it occurs (Laplace), so that none is impossible.

    Args:
      experiment: its objective must predict tokens.
      source: other held-out data than the config's ``data.eval``.

    Raises:
      LmxError: the objective predicts something else.
    """
    if not any(name.endswith("targets") for name in experiment.objective.lengths):
        raise LmxError(
            f"task 'unigram' is for objectives that predict tokens, not {experiment.config.objective.name!r}."
        )
    train, held_out = (_counts(experiment, data) for data in (experiment.config.data.train, source))
    probabilities = (train + 1) / (train + 1).sum()
    return {"eval/unigram_loss": float(-(held_out * np.log(probabilities)).sum() / held_out.sum())}


def _counts(experiment: Experiment, source: str | None) -> np.ndarray:
    """How often each token is a target, every row of the data seen once."""
    counts = np.zeros(experiment.config.model.vocab_size)
    for batch in experiment.eval_batches(source):
        for name in (name for name in batch if name.endswith("targets")):
            weights = batch[name.replace("targets", "weights")]
            counts += np.bincount(batch[name].ravel(), weights.ravel(), minlength=len(counts))
    return counts
