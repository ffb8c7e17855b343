"""Signals: the first asks, the second ends at once, even where Python runs no handler."""

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lmx.training.stopping import Interrupt

STUCK = """
import ctypes, sys
from lmx.training.stopping import Interrupt
with Interrupt() as interrupt:
    print("open", flush=True)
    while True:
        ctypes.CDLL(None).sleep(600)  # signals wake it; Python's handlers run only when it is through
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_kept_and_the_old_handlers_come_back(number):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert interrupt.signal is None
        signal.raise_signal(number)
        assert interrupt.signal is number
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_at_a_prompt_a_second_interrupt_is_pythons_own(monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(KeyboardInterrupt):
        with Interrupt():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_process_that_hangs_outside_python(number):
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "open\n"
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    for _ in range(300):  # one that comes before the first was taken in is no second one
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "a second signal; ended at once" in errors
