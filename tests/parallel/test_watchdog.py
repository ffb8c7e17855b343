"""Who is waited for is named, and nobody waits for ever."""

import threading

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


@pytest.mark.parametrize(
    ("service", "message"),
    [
        (Service({1: 12, 2: 9}), "Process 2 on host2 is behind, at step 9: it is waited for."),
        (Service({1: 12}), "Process 2 does not answer"),
        (Service({1: 12, 2: 12}), "All processes stand at that step"),
        (Silent({}), "Process 0 does not answer"),
    ],
)
def test_who_is_waited_for_is_named(service, message, monkeypatch, capfd):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    if isinstance(service, Silent):
        monkeypatch.setattr(module, "ANSWER_SECONDS", 0.1)
    ended = []
    watchdog = Watchdog(1000.0, "runs/x", service, ended.append)
    watchdog.beat(12)
    watchdog._give_up(1001.0)
    assert ended == [PEER_LOST]
    said = capfd.readouterr().err
    assert "process 0 of 3 did nothing for" in said and "at step 12" in said and "runs/x" in said
    assert message in said


def test_a_run_that_stands_still_is_ended_by_a_thread_of_its_own():
    ended, done = [], threading.Event()
    with Watchdog(0.2, "runs/x", Service({}), lambda status: (ended.append(status), done.set())) as watchdog:
        watchdog.beat(12)
        assert done.wait(60)
    assert ended == [PEER_LOST]


def given_up(monkeypatch, looks):
    """Whether a run with a limit of 100 seconds is given up, whose watchdog looks so many seconds apart.

    Args:
      looks: pairs of the seconds that have passed, and whether a step was begun meanwhile, or it "rests".
    """
    clock, ended = [0.0], []
    watchdog = Watchdog(100.0, "runs/x", Service({}))
    left = iter(looks)

    def wait(tick):
        seconds, stepped = next(left, (None, False))
        clock[0] += seconds or 0.0
        if stepped == "rests":
            watchdog.rest()
        elif stepped:
            watchdog.beat(1)
        return seconds is None

    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watchdog._done, "wait", wait)
    monkeypatch.setattr(watchdog, "_give_up", lambda stalled: ended.append(True))
    watchdog._watch()
    return bool(ended)


def test_steps_keep_a_run_alive_and_the_first_one_may_take_its_time(monkeypatch):
    compiling = [(1.0, False)] * 300
    assert not given_up(monkeypatch, compiling)
    steps = [(1.0, index % 50 == 0) for index in range(300)]
    assert not given_up(monkeypatch, [*compiling, *steps])
    assert given_up(monkeypatch, [*compiling, *steps, *[(1.0, False)] * 101])


def test_what_rests_is_not_counted_until_the_next_step(monkeypatch):
    resting = [(1.0, True), (1.0, "rests"), *[(1.0, False)] * 300]
    assert not given_up(monkeypatch, resting)
    assert given_up(monkeypatch, [*resting, (1.0, True), *[(1.0, False)] * 101])


def test_a_process_that_was_stopped_itself_does_not_blame_others(monkeypatch):
    stopped = [(1.0, True), (1000.0, False), (1.0, False)]
    assert not given_up(monkeypatch, [*stopped, *[(1.0, False)] * 90])
    assert given_up(monkeypatch, [*stopped, *[(1.0, False)] * 110])  # counted anew from then on


def test_a_run_of_one_process_is_not_watched():
    before = threading.active_count()
    with Watchdog(0.1, "runs/x") as watchdog:
        watchdog.beat(1)
        assert threading.active_count() == before
