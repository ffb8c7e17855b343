"""Random batches in the form of an objective's: what is in them does not matter, how they are filled does."""

from collections.abc import Mapping

import numpy as np

from lmx.config import Config


def random_batch(config: Config, shapes: Mapping[str, tuple[int, ...]], documents: str, seed: int = 0) -> dict:
    """A batch with arrays of these shapes.

    Args:
      config: the vocabulary, and which part of the tokens is predicted.
      shapes: [batch, length] by name.
      documents: see :class:`lmx.benchmarking.cases.Case`; short documents have a quarter of a row to a whole one, and
        these lengths do not depend on whether they are packed.
    """
    rng = np.random.default_rng(seed)
    batch = {}
    for name, shape in shapes.items():
        kind = name.rpartition("_")[2]
        if kind in ("tokens", "targets"):
            batch[name] = rng.integers(10, config.model.vocab_size, shape, dtype=np.int32)
        elif kind in ("segments", "positions"):
            batch[name] = _places(rng_of(seed), shape, documents)[kind]
        elif kind == "weights":
            batch[name] = np.ones(shape, np.float32)
        else:
            batch[name] = np.zeros(shape, np.int32)
    if config.objective.name == "mlm":
        chosen = _chosen(rng, batch["segments"] > 0, config.objective.mask_rate)
        batch["weights"] = chosen.astype(np.float32)
    return batch


def rng_of(seed: int) -> np.random.Generator:
    """The generator of lengths, which is the same for every array of a batch."""
    return np.random.default_rng((seed, 1))


def _places(rng: np.random.Generator, shape: tuple[int, ...], documents: str) -> dict[str, np.ndarray]:
    rows, length = shape
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row in range(rows):
        start, number = 0, 1
        while start < length:
            size = length if documents == "whole" else int(rng.integers(length // 4, length + 1))
            end = min(length, start + size)
            segments[row, start:end], positions[row, start:end] = number, np.arange(end - start)
            start, number = end if documents == "packed" else length, number + 1
    return {"segments": segments, "positions": positions}


def _chosen(rng: np.random.Generator, real: np.ndarray, rate: float) -> np.ndarray:
    """That part of each row's tokens, at random."""
    scores = np.where(real, rng.random(real.shape), 2.0)
    count = np.maximum(1, np.round(rate * real.sum(1)).astype(int))
    ranks = scores.argsort(1).argsort(1)
    return ranks < count[:, None]
