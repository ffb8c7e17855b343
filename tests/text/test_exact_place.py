"""The place in the data: the very next batch, whatever loads it, however many hosts share it, and whoever dies."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grain
import numpy as np
import pytest

from lmx.errors import DataError
from lmx.text import resumable
from lmx.text.resumable import FromIndex
from tests.text.test_pipeline import STREAMS, assert_same, take

ROWS = 4  # of a global batch
# Hosts and workers before, hosts and workers after.
CHANGES = [
    ((1, 0), (2, 0)),
    ((2, 0), (1, 0)),
    ((2, 0), (4, 0)),
    pytest.param((1, 0), (1, 2), marks=pytest.mark.exhaustive),
    pytest.param((2, 2), (1, 0), marks=pytest.mark.exhaustive),
    pytest.param((1, 2), (4, 1), marks=pytest.mark.exhaustive),
]


def hosts(name, count, workers, state=None):
    """An iterator for each of ``count`` hosts, from a saved place on."""
    made = []
    for index in range(count):
        made.append(STREAMS[name](batch_size=ROWS // count, hosts=(index, count), num_workers=workers))
        if state is not None:
            made[-1].set_state(state)
    return made


def global_batches(made, count):
    """The batches that the hosts have together."""
    parts = [take(iterator, count) for iterator in made]
    return [
        {name: np.concatenate([part[name] for part in batch]) for name in batch[0]}
        for batch in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize(("before", "after"), CHANGES)
@pytest.mark.parametrize("name", STREAMS)
def test_another_number_of_hosts_and_workers_goes_on_with_the_next_batch(name, before, after):
    # 5 batches are 20 rows: mid-epoch (of 10, 6 or 40), mid-mixture, and with examples waiting for room in a pack.
    expected = take(STREAMS[name](), 11)
    first = hosts(name, *before)
    assert_same(global_batches(first, 5), expected[:5])
    states = [json.dumps(iterator.get_state()) for iterator in first]
    assert len(set(states)) == 1  # one is saved, by one process, and it is everybody's
    second = hosts(name, *after, json.loads(states[0]))
    assert_same(global_batches(second, 6), expected[5:])
    for iterator in (*first, *second):
        iterator.close()


@pytest.mark.parametrize("name", STREAMS)
def test_the_place_is_small_and_does_not_grow(name):
    stream = STREAMS[name]()
    take(stream, 3)
    early = len(json.dumps(stream.get_state()))
    take(stream, 60)
    assert len(json.dumps(stream.get_state())) < early + 100
    assert early < 1000


def workers_of(pid):
    """Processes that Grain started, which have Python's spawn in their command."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == pid and b"spawn_main" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")


@needs_proc
@pytest.mark.parametrize("name", [pytest.param("rows", marks=pytest.mark.exhaustive), "packed"])
def test_a_loader_worker_that_is_killed_costs_no_batch(name, capfd):
    expected = take(STREAMS[name](), 400)  # far more than is packed ahead
    helped = STREAMS[name](num_workers=1)
    found = take(helped, 3)
    (worker,) = workers_of(os.getpid())
    os.kill(worker, signal.SIGKILL)
    found += take(helped, 397)
    helped.close()
    assert_same(found, expected)
    assert "a loader worker died; starting again at element" in capfd.readouterr().err


def test_workers_that_die_again_and_again_are_an_error_with_advice():
    def dies(x):
        deaths.append(x)
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -9.")

    deaths = []
    elements = iter(FromIndex(grain.MapDataset.range(3).map(dies), 0, 0))
    with pytest.raises(DataError, match="died 4 times at element 0 .*exit code -9.*data.num_workers"):
        next(elements)
    assert deaths == [0] * (resumable.RESTARTS + 1)


def test_other_errors_are_not_taken_for_a_dead_worker():
    def broken(x):
        raise RuntimeError("of the user's own")

    with pytest.raises(RuntimeError, match="of the user's own"):
        next(iter(FromIndex(grain.MapDataset.range(3).map(broken), 0, 0)))


ORPHANS = """
import os
from tests.text.test_pipeline import STREAMS, take
if __name__ == "__main__":
    stream = STREAMS["rows"](num_workers=1)
    take(stream, 2)
    from tests.text.test_exact_place import workers_of
    print(*workers_of(os.getpid()), flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.exhaustive
@needs_proc
def test_no_worker_outlives_a_killed_run(tmp_path):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, script], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    (worker,) = done.stdout.split()
    end = time.monotonic() + 30
    while (Path("/proc") / worker).exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not (Path("/proc") / worker).exists()


def test_a_batch_is_the_same_whoever_made_it_before():
    """Going back and forth on one iterator leaves nothing behind."""
    for name in STREAMS:
        stream = STREAMS[name]()
        start = stream.get_state()
        first = list(itertools.islice(stream, 3))
        stream.set_state(start)
        assert_same(take(stream, 3), first)
