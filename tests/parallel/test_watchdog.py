"""Who is waited for is named, and nobody waits for ever."""

import threading
import time
from types import SimpleNamespace

import jax
import pytest

from lmx.parallel import watchdog as module
from lmx.parallel.processes import PEER_LOST
from lmx.parallel.watchdog import FOLDER, Watchdog


class Service:
    """As much of the coordination service as the watchdog asks for; three processes, of which this is the first."""

    def __init__(self, others):
        self.said = {f"{FOLDER}{index}": f"{step} host{index}" for index, step in others.items()}

    def key_value_set(self, name, value, allow_overwrite):
        self.said[name] = value

    def key_value_dir_get(self, folder):
        return list(self.said.items())


class Silent(Service):
    """A coordinator that does not answer."""

    def key_value_set(self, *_, **__):
        threading.Event().wait()


@pytest.fixture(autouse=True)
def three_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 0)


def ends(service, seconds=0.2):
    """The statuses that a run is ended with which stands still at step 12."""
    ended, done = [], threading.Event()
    with Watchdog(seconds, "runs/x", service, lambda status: (ended.append(status), done.set())) as watchdog:
        watchdog.beat(12)
        assert done.wait(30)
    return ended


@pytest.mark.parametrize(
    ("service", "message"),
    [
        (Service({1: 12, 2: 9}), "Process 2 on host2 is behind, at step 9: it is waited for."),
        (Service({1: 12}), "Process 2 does not answer"),
        (Service({1: 12, 2: 12}), "All processes stand at that step"),
        (Silent({}), "Process 0 does not answer"),
    ],
)
def test_who_is_waited_for_is_named(service, message, capfd):
    assert ends(service) == [PEER_LOST]
    said = capfd.readouterr().err
    assert "process 0 of 3 did nothing for" in said and "at step 12" in said and "runs/x" in said
    assert message in said


def test_steps_keep_a_run_alive_and_the_first_one_may_take_its_time():
    ended = []
    with Watchdog(0.3, "runs/x", Service({}), ended.append) as watchdog:
        time.sleep(0.6)  # compiling
        for step in range(10):
            watchdog.beat(step)
            time.sleep(0.06)
    time.sleep(0.5)  # and when it is over nobody watches
    assert ended == []


def test_a_process_that_was_stopped_itself_does_not_blame_others(monkeypatch):
    ended = []
    watchdog = Watchdog(100.0, "runs/x", Service({}), ended.append)
    # A clock of the module alone: other threads of the tests look at the real one.
    clock = iter([0.0, 0.5, 1000.0, 1001.0, 1002.0])  # stopped for a quarter of an hour after the first look
    monkeypatch.setattr(
        module, "time", SimpleNamespace(monotonic=lambda: next(clock))
    )  # other threads have the real one
    looks = iter([False, False, False, True])
    monkeypatch.setattr(watchdog, "_done", type("Looks", (), {"wait": lambda self, tick: next(looks)})())
    watchdog.beat(1)  # at 0
    watchdog._watch()
    assert ended == [] and watchdog._since == 1000.0


def test_a_run_of_one_process_is_not_watched():
    before = threading.active_count()
    with Watchdog(0.1, "runs/x") as watchdog:
        watchdog.beat(1)
        assert threading.active_count() == before
