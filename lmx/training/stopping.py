"""Stopping in good order: signals, and an evaluation metric that has converged."""

import signal
import threading
from collections.abc import Iterable


class Interrupt:
    """While open, the first SIGINT or SIGTERM asks the loop to stop after its step; a second one acts at once.

    Attributes:
      signal: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._old: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, number: int, _frame: object) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()


def has_converged(losses: Iterable[float], patience: int, delta: float) -> bool:
    """Whether the last ``patience`` evaluations brought no loss lower than the best before them by more than
    ``delta``. A patience of 0 never converges."""
    best, since = float("inf"), 0
    for loss in losses:
        if loss < best - delta:
            best, since = loss, 0
        else:
            since += 1
    return 0 < patience <= since
