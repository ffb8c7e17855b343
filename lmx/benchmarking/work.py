"""What a system has ready to be timed, and the inputs that all systems share."""

import dataclasses
from collections.abc import Callable

import numpy as np

from lmx.benchmarking.cases import Case

BATCHES = 50  # of a turn at the input
BATCH = "batch.safetensors"  # beside the model, for those who come after


@dataclasses.dataclass
class Work:
    """A case as one system does it.

    Attributes:
      run: does it once and waits for the end; returns what tells that it was done (a loss, tokens made).
      facts: ``compile``, the seconds that it took, and ``flops`` of a run, where they are known.
      first_token: of generation: up to the first new token.
      program: the compiled program, where it is one.
    """

    run: Callable[[], float]
    facts: dict[str, float] = dataclasses.field(default_factory=dict)
    first_token: Callable[[], float] | None = None
    program: str | None = None


def prompts_of(case: Case) -> list[list[int]]:
    """The prompts of a generation case."""
    rng = np.random.default_rng(0)
    return rng.integers(10, case.config.model.vocab_size, (case.prompts, case.prompt_length)).tolist()
