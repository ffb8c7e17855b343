"""What goes wrong in a run's life: each fault is really done to it, and the run is, to the bit, the one without."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from lmx.errors import CheckpointError, DataError, TrainingError
from lmx.training import metrics
from lmx.training.checkpoints import Checkpoints
from lmx.training.experiment import Experiment
from lmx.training.lock import WorkdirLock
from lmx.training.loop import train
from lmx.training.metrics import MetricsWriter, read_metrics
from tests.end_to_end.conftest import QUICKSTART, ROOT
from tests.end_to_end.test_train import SMALL, final_state, run, small


class Batches:
    """The training batches, with something done before some of them."""

    def __init__(self, batches, before):
        self._batches, self._before, self._taken = batches, before, 0
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        batch = next(self._batches)
        self._taken = self.get_state()["next_index"]
        return self._before(self._taken, batch) or batch


@pytest.fixture
def before_step(monkeypatch):
    """Has a function of the step and its batch called before each step; it may return another batch."""
    train_batches = Experiment.train_batches

    def install(function):
        monkeypatch.setattr(Experiment, "train_batches", lambda self: Batches(train_batches(self), function))

    return install


def stopping_at(*steps):
    """A function for ``before_step`` that asks the run to stop after these steps."""
    return lambda step, batch: signal.raise_signal(signal.SIGTERM) if step in steps else None


def with_nan(*steps):
    """A function for ``before_step`` that spoils the batches of these steps."""

    def spoil(step, batch):
        if step in steps:
            return batch | {"weights": np.where(batch["weights"] > 0, np.float32("nan"), 0).astype(np.float32)}

    return spoil


def lines_of(workdir):
    return final_state(workdir)[2]


def assert_same_run(left, right):
    (step, params, lines), (step_right, params_right, lines_right) = final_state(left), final_state(right)
    assert (step, lines) == (step_right, lines_right)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(params_right), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_run_stopped_between_two_lines_writes_the_lines_of_one_that_was_not(tmp_path, before_step):
    settings = ("train.log_every=5", "train.checkpoint_every=100")
    run(tmp_path / "unbroken", *settings)
    before_step(stopping_at(3, 4, 8))
    ended = [run(tmp_path / "stopped", *settings).ended for _ in range(4)]
    assert ended == ["SIGTERM"] * 3 + ["complete"]
    assert_same_run(tmp_path / "unbroken", tmp_path / "stopped")


@pytest.mark.exhaustive
def test_other_machines_see_the_same_batches_and_the_same_losses(tmp_path, before_step):
    def recording(seen, *stops):
        def record(step, batch):
            seen[step] = {name: zlib.crc32(array.tobytes()) for name, array in batch.items()}
            stopping_at(*stops)(step, batch)

        return record

    expected, found = {}, {}
    before_step(recording(expected))
    train(small(), tmp_path / "one", console=Console(quiet=True), devices=jax.devices()[:1])
    before_step(recording(found, 4, 8))
    for devices, workers in ((1, 0), (4, 2), (2, 0)):
        config = small(f"data.num_workers={workers}")
        train(config, tmp_path / "moved", console=Console(quiet=True), devices=jax.devices()[:devices])
    assert found == expected and len(found) == 12
    for a, b in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "moved"), strict=True):
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-4)


def test_a_batch_that_is_not_finite_stops_the_run_by_default(tmp_path, before_step):
    before_step(with_nan(6))
    with pytest.raises(
        TrainingError, match="of step 6 is not finite. The last good checkpoint is step 4.*on_nan='skip'"
    ):
        run(tmp_path, "data.shuffle=False")


@pytest.mark.slow
def test_batches_that_are_not_finite_are_skipped_and_counted(tmp_path, before_step):
    before_step(with_nan(3, 5, 6))
    settings = ("train.on_nan=skip", "train.max_skipped=3")
    assert run(tmp_path / "skipped", *settings).step == 12
    lines = {line["step"]: line for line in lines_of(tmp_path / "skipped")}
    assert [lines[step]["train/skipped"] for step in (2, 4, 6, 8)] == [0, 1, 2, 0]
    assert "train/loss" not in lines[6] and lines[4]["train/loss"] < 6  # of a batch that was there
    with Checkpoints(tmp_path / "skipped", read_only=True) as checkpoints:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(checkpoints.restore_params()))
    # Stopped and started again it counts on from where it was.
    before_step(lambda step, batch: (stopping_at(4)(step, batch), with_nan(3, 5, 6)(step, batch))[1])
    assert [run(tmp_path / "stopped", *settings).ended for _ in range(2)] == ["SIGTERM", "complete"]
    assert_same_run(tmp_path / "skipped", tmp_path / "stopped")


def test_more_than_the_most_skipped_batches_end_the_run(tmp_path, before_step):
    before_step(with_nan(1, 3, 5))
    with pytest.raises(TrainingError, match="3 batches up to step 6 were skipped.*train.max_skipped is 2"):
        run(tmp_path, "train.on_nan=skip", "train.max_skipped=2")


@pytest.mark.slow
def test_changed_data_is_refused_by_the_files_name_and_let_pass_when_asked(tmp_path, capsys):
    book = tmp_path / "book.txt"
    book.write_text("It was a dark and stormy night. " * 200)
    settings = (f"data.train=text:{book}", "train.eval_every=100", "train.checkpoint_every=100")
    run(tmp_path / "run", *settings, "train.steps=2")
    book.write_text("It was a dark and stormy night! " * 200)
    with pytest.raises(DataError, match=rf"{book} has other content.*--config.data.on_change=warn"):
        run(tmp_path / "run", *settings, "train.steps=4")
    console = Console(width=500)
    config = small(*settings, "train.steps=4", "data.on_change=warn")
    assert train(config, tmp_path / "run", console=console, devices=jax.devices()[:1]).step == 4
    assert f"{book} has other content" in capsys.readouterr().out
    assert run(tmp_path / "run", *settings, "train.steps=6").step == 6  # what it went on with is its data now


def test_a_run_in_a_workdir_that_is_in_use_is_refused(tmp_path):
    with WorkdirLock(tmp_path), pytest.raises(CheckpointError, match="another run is training in"):
        run(tmp_path)
    assert os.listdir(tmp_path) == [".lock"]


def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(tmp_path, capsys):
    run(tmp_path / "unbroken")
    shutil.copytree(tmp_path / "unbroken", tmp_path / "damaged")
    victim = tmp_path / "damaged" / "checkpoints" / "12" / "optimizer" / "_METADATA"
    victim.write_bytes(victim.read_bytes()[:-3])
    train(small(), tmp_path / "damaged", console=Console(width=500), devices=jax.devices()[:1])
    said = capsys.readouterr().out
    assert "checkpoint 12 in" in said and "optimizer/_METADATA" in said and "resumed at step 8" in said
    assert_same_run(tmp_path / "unbroken", tmp_path / "damaged")


def test_the_loop_says_how_long_it_waits_for_input(tmp_path):
    run(tmp_path, "train.steps=4")
    waits = [line["input_wait"] for line in read_metrics(tmp_path) if "input_wait" in line]
    assert len(waits) == 2 and all(0 <= wait <= 1 for wait in waits)


# A disk that fills up


@contextlib.contextmanager
def small_disk(folder, size, options=""):
    """A disk of its own in memory; skips where mounting is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_said_to_be_one_and_room_is_all_that_is_needed(tmp_path):
    """With a disk of its own: full in the middle of a checkpoint, then in the middle of a line."""
    run(tmp_path / "unbroken")
    with small_disk(tmp_path / "disk", "2m"):
        workdir, ballast = tmp_path / "disk" / "run", tmp_path / "disk" / "ballast"
        run(workdir, "train.steps=4")
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1000))
        os.truncate(ballast, ballast.stat().st_size - 30_000)
        with pytest.raises(CheckpointError, match="cannot take any more .*make room, and run the same command again"):
            run(workdir)
        steps = [line["step"] for line in read_metrics(workdir)]
        assert steps == sorted(set(steps)) and (workdir / "metrics.jsonl").read_text().endswith("\n")
        ballast.unlink()
        assert run(workdir).step == 12
        (_, params, _), (_, expected, _) = final_state(workdir), final_state(tmp_path / "unbroken")
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_read_only_disk_is_refused_before_anything_is_computed(tmp_path):
    with small_disk(tmp_path / "disk", "1m", ",ro"):
        with pytest.raises(CheckpointError, match=r"cannot be written \(Read-only file system\)"):
            run(tmp_path / "disk" / "run")


def test_a_line_for_which_there_is_no_room_is_not_begun(tmp_path, monkeypatch):
    """Without a disk of its own: the system allows files of so many bytes only, and the last line breaks off."""
    monkeypatch.setattr(metrics, "_tensorboard", lambda *_: None)
    with MetricsWriter(tmp_path) as writer:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
            with pytest.raises(OSError) as raised:
                for step in range(1, 100):
                    writer.write(step, {"train/loss": 1 / step})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno in (errno.ENOSPC, errno.EFBIG)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert 950 < len(text) < 1000 and text.endswith("}\n")
    assert [json.loads(line)["step"] for line in text.splitlines()] == list(range(1, len(text.splitlines()) + 1))


@pytest.mark.slow
def test_a_checkpoint_for_which_there_is_no_room_leaves_the_one_before(tmp_path, monkeypatch):
    """Without a disk of its own: the system says that there is no room when the manifest is written."""
    from lmx.training import checkpoints as module

    def full(folder):
        if folder.name.startswith("8."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        return write_manifest(folder)

    write_manifest = module.write_manifest
    monkeypatch.setattr(module, "write_manifest", full)
    with pytest.raises(CheckpointError, match=r"cannot take any more \(No space left on device\)"):
        run(tmp_path / "full")
    with Checkpoints(tmp_path / "full", read_only=True) as checkpoints:
        assert checkpoints.steps() == [4]
    monkeypatch.undo()
    run(tmp_path / "full")
    run(tmp_path / "unbroken")
    assert_same_run(tmp_path / "full", tmp_path / "unbroken")


# Kills


WRITER = """
import sys
from lmx.training import metrics
metrics._tensorboard = lambda *_: None
lines = metrics.MetricsWriter(sys.argv[1], resume_step=int(sys.argv[2]))
print("open", flush=True)
step = int(sys.argv[2])
while True:
    step += 1
    lines.write(step, {f"train/{i}": step / 7 for i in range(40)})
    lines.sync() if step % 1000 == 0 else None
"""


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.exhaustive)])
def test_metrics_killed_while_lines_are_written_are_whole_and_each_there_once(kills, tmp_path):
    draw, done = np.random.default_rng(0), 0
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path, str(done)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "open\n"
        before = (tmp_path / "metrics.jsonl").stat().st_size
        while (tmp_path / "metrics.jsonl").stat().st_size == before:  # it has begun to write
            assert process.poll() is None
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.communicate()
        text = (tmp_path / "metrics.jsonl").read_text().rstrip(" ")  # what comes before a line that would span pages
        steps = [json.loads(line)["step"] for line in text.splitlines()]
        assert text.endswith("\n") and steps == list(range(1, len(steps) + 1)) and len(steps) > done
        done = max(1, len(steps) - 5)  # as if the checkpoint were a little older than the lines


@pytest.mark.exhaustive
def test_a_run_killed_at_random_moments_is_to_the_bit_the_unbroken_one(tmp_path):
    report = tmp_path / "kills.json"
    command = [sys.executable, "-m", "benchmarks.kills", "--kills", "4", "--steps", "16", "--json", str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row["value"] for row in json.loads(report.read_text())["rows"]}
    assert rows["kills survived"] == 4
    assert all(value == 0 for name, value in rows.items() if "not equal" in name or "other batches" in name)
    assert rows["1, 4, 2 devices and 0, 2, 0 workers: largest difference of a loss"] < 1e-4


@pytest.mark.exhaustive
def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(tmp_path):
    """Kills itself when the second checkpoint is written in full and not yet committed."""
    script = (
        "import os, sys\n"
        "from lmx.training import checkpoints\n"
        "write = checkpoints.write_manifest\n"
        "checkpoints.write_manifest = lambda f: os.kill(os.getpid(), 9) if f.name.startswith('8.') else write(f)\n"
        "from lmx.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", script, "train", "--config", QUICKSTART, "--workdir", str(tmp_path / "killed")]
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"}
    done = subprocess.run([*command, *SMALL], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    left = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert "4" in left and "8" not in left and any(name.startswith("8.") for name in left)
    run(tmp_path / "killed")
    run(tmp_path / "unbroken")
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken")
    assert not [path for path in Path(tmp_path / "killed" / "checkpoints").iterdir() if "tmp" in path.name]
