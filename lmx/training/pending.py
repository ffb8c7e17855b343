"""Metrics of the steps that no line of ``metrics.jsonl`` tells of yet."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lmx.training.step import SKIPPED

Sums = dict[str, tuple[float, float]]


class Pending:
    """Sums and weights, step by step: on the device until somebody asks for them, and saved with a checkpoint.

    So a line means the same steps in a run that was broken off between two lines as in one that was not.

    Args:
      saved: of the steps before, as :meth:`saved` gave them.
    """

    def __init__(self, saved: Sequence[dict[str, Sequence[float]]] = ()):
        float32 = np.float32
        self._steps: list[Any] = [{name: tuple(map(float32, pair)) for name, pair in step.items()} for step in saved]

    def add(self, metrics: Any) -> None:
        """Adds a step's; waits for nothing."""
        self._steps.append(metrics)

    def saved(self) -> list[dict[str, list[float]]]:
        """All of them as JSON can hold them, to the last bit."""
        return [{name: [float(x) for x in pair] for name, pair in step.items()} for step in self._fetched()]

    def broken(self, step: int) -> tuple[int, list[str]] | None:
        """The first step with a value that is not finite, and the names of those; None if there is none.

        Args:
          step: of the last one that was added.
        """
        fetched = self._fetched()
        for number, metrics in enumerate(fetched, start=step - len(fetched) + 1):
            names = sorted(name for name, (total, _) in metrics.items() if not math.isfinite(total))
            if names:
                return number, names
        return None

    def skipped(self) -> int:
        """How many of the steps left their batch out (``train.on_nan``)."""
        return sum(int(step[SKIPPED][0]) for step in self._fetched() if SKIPPED in step)

    def take(self) -> dict[str, float]:
        """The means over all steps, for a line; of ``skipped`` the count. Begins anew."""
        fetched, skipped = self._fetched(), self.skipped()
        self._steps = []
        line = means([{name: pair for name, pair in step.items() if name != SKIPPED} for step in fetched])
        if skipped == len(fetched):  # they mean nothing
            line = {}
        return line | ({SKIPPED: skipped} if SKIPPED in fetched[-1] else {})

    def _fetched(self) -> list[Sums]:
        self._steps = jax.device_get(self._steps)
        return self._steps


def means(metrics: Sequence[Sums]) -> dict[str, float]:
    """The one division: sums over all steps and parts, by their weights."""
    sums = jax.tree.map(lambda *parts: float(sum(parts)), *metrics)
    return {name: total / weight if weight else 0.0 for name, (total, weight) in sums.items()}
