"""Stopping in good order: signals, and an evaluation metric that has converged."""

import os
import signal
import sys
import threading
from collections.abc import Iterable

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """While open, the first SIGINT or SIGTERM asks the loop to stop after its step; a second one ends the process.

    Python runs its handlers between two steps of its own, which may be long in coming: a program is being compiled, or
    a device does not answer. So a thread listens beside them for the second signal, and ends the process whatever the
    others do, with the status that a shell gives for it. At a prompt or in a notebook, which should outlive a run, a
    second SIGINT raises KeyboardInterrupt instead.

    Attributes:
      signal: the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._interactive = hasattr(sys, "ps1") or "ipykernel" in sys.modules
        self._old: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._old = {number: signal.signal(number, self._handle) for number in SIGNALS}
            if not self._interactive:
                reader, self._writer = os.pipe()
                os.set_blocking(self._writer, False)
                self._old_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
                threading.Thread(target=_end_at_second, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if self._old and not self._interactive:
            signal.set_wakeup_fd(self._old_writer)
            os.close(self._writer)  # which ends the thread
        self._old = {}

    def _handle(self, number: int, _frame: object) -> None:
        if self.signal is not None and self._interactive:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)


def _end_at_second(reader: int) -> None:
    """Reads the numbers of signals as they come, until the other end is closed; the second ends the process."""
    heard = 0
    while number := os.read(reader, 1):
        heard += number[0] in SIGNALS
        if heard == 2:
            message = "lmx: a second signal; ended at once. The same command goes on from the newest checkpoint.\n"
            os.write(sys.__stderr__.fileno(), message.encode())
            os._exit(128 + number[0])
    os.close(reader)


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
