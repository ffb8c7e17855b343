"""One run as several real processes: the same curve, one log, and an end in good order when one of them dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from lmx.parallel.processes import PEER_LOST
from lmx.training.lock import WorkdirLock

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "model.num_layers=2",
    "model.num_heads=2",
    "model.embed_dim=32",
    "model.mlp_dim=64",
    "data.length=32",
    "train.global_batch_size=8",
    "train.log_every=1",
    "train.eval_every=3",
    "train.samples=0",
    "eval.max_batches=2",
    "optimizer.warmup_steps=2",
)


_started = []


@pytest.fixture(autouse=True)
def none_is_left():
    """Processes that a failing test leaves behind, stopped ones too, are ended."""
    yield
    while _started:
        _started.pop().kill()


def start(workdir, processes, devices, *overrides):
    """Starts ``lmx train`` as so many processes, with so many devices in all."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "lmx", "train", "--config", "experiments/gpt2.py:tiny", "--workdir", str(workdir)]
    command += [f"--config.{setting}" for setting in (*SETTINGS, *overrides)]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices // processes}",
        "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "lmx-jax-cache-processes"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    told = lambda i: ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(processes), "--process-id", str(i)]  # noqa: E731
    running = [
        subprocess.Popen(
            command + (told(i) if processes > 1 else []),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    _started.extend(running)
    return running


# What the collectives' library prints, piece by piece: another thread may write between any two of them.
GLOO = re.compile(r"\[Gloo\] Rank |is connected to|peer ranks\.|Expected number of connected peer ranks is :")


def said_by_lmx(out):
    """The lines of an output that say anything, without Gloo's, of which a number alone may be left."""
    return "\n".join(line for line in GLOO.sub("", out).splitlines() if re.search("[A-Za-z]", line))


def finish(running, timeout=300):
    """Exit status, what lmx said, and the errors of each."""
    ended = [process.communicate(timeout=timeout) for process in running]
    return [
        (process.returncode, said_by_lmx(out), errors) for process, (out, errors) in zip(running, ended, strict=True)
    ]


def train(workdir, processes, devices, *overrides):
    ended = finish(start(workdir, processes, devices, *overrides))
    assert [status for status, _, _ in ended] == [0] * processes, ended
    return ended


def losses(workdir):
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): line[name] for line in lines for name in ("train/loss", "eval/loss") if name in line}


def assert_same_curve(found, expected):
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The curve of one process with four devices."""
    workdir = tmp_path_factory.mktemp("alone")
    train(workdir, 1, 4, "train.steps=6")
    return losses(workdir)


@pytest.mark.parametrize(
    ("processes", "mesh"),
    [
        (2, ("mesh.fsdp=2",)),
        pytest.param(2, ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2"), marks=pytest.mark.exhaustive),
        pytest.param(2, ("mesh.data=1", "mesh.stage=2", "mesh.tensor=2"), marks=pytest.mark.exhaustive),
        pytest.param(2, ("mesh.data=1", "mesh.tensor=4"), marks=pytest.mark.exhaustive),
        pytest.param(4, ("mesh.fsdp=2",), marks=pytest.mark.exhaustive),
        pytest.param(4, ("mesh.data=2", "mesh.sequence=2"), marks=pytest.mark.exhaustive),
    ],
)
def test_several_processes_give_the_curve_of_one(processes, mesh, alone, tmp_path):
    ended = train(tmp_path, processes, 4, "train.steps=6", *mesh)
    assert_same_curve(losses(tmp_path), alone)
    assert "report:" in ended[0][1] and not ended[1][1]  # one of them speaks
    assert json.loads((tmp_path / "config.json").read_text())["num_devices"] == 4
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()] == ["6"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["mesh.data=2", pytest.param("mesh.fsdp=2", marks=pytest.mark.exhaustive)])
def test_several_processes_start_from_another_run(mesh, tmp_path):
    train(tmp_path / "first", 1, 1, "train.steps=3")
    settings = (mesh, "train.steps=3", f"train.init_from={tmp_path / 'first'}")
    ended = train(tmp_path / "second", 2, 2, *settings)
    assert "started from" in " ".join(ended[0][1].split())
    loss = losses(tmp_path / "first")[3, "eval/loss"]
    assert losses(tmp_path / "second")[0, "eval/loss"] == pytest.approx(loss, rel=1e-5)


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_when_one_is_killed_and_the_same_command_resumes(victim, tmp_path):
    overrides = ("train.steps=4000", "train.checkpoint_every=2", "train.eval_every=4000", "mesh.fsdp=2")
    running = start(tmp_path, 2, 4, *overrides)
    wait_for(lambda: len([p for p in (tmp_path / "checkpoints").glob("*") if p.name.isdigit()]) > 1)
    running[victim].kill()
    (status, _, errors) = finish(running, timeout=180)[1 - victim]
    assert status not in (0, -signal.SIGKILL)
    assert "lost another one of this run" in errors and "same command" in errors
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    again = start(tmp_path, 2, 4, *(("train.steps=" + str(saved + 40),) + overrides[1:]))
    ended = finish(again)
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert "resumed" in ended[0][1]
    steps = [step for step, _ in losses(tmp_path)]
    assert sorted(set(steps)) == sorted(range(0, saved + 41))


@pytest.mark.exhaustive
def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    overrides = ("train.steps=4000", "train.checkpoint_every=4000", "train.eval_every=4000", "mesh.fsdp=2")
    running = start(tmp_path, 2, 4, *overrides)
    wait_for(lambda: (tmp_path / "metrics.jsonl").is_file() and len(losses(tmp_path)) > 3)
    running[1].send_signal(signal.SIGTERM)
    ended = finish(running)
    assert [status for status, _, _ in ended] == [128 + signal.SIGTERM] * 2
    assert "SIGTERM at step" in ended[0][1]


@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_hangs_is_named_and_nobody_waits_for_it(victim, tmp_path):
    overrides = ("train.steps=4000", "train.checkpoint_every=2", "train.eval_every=4000", "train.stalled_after=10")
    running = start(tmp_path, 2, 4, *overrides, "mesh.fsdp=2")
    wait_for(lambda: len([p for p in (tmp_path / "checkpoints").glob("*") if p.name.isdigit()]) > 1)
    running[victim].send_signal(signal.SIGSTOP)
    (status, _, errors) = finish([running[1 - victim]], timeout=90)[0]  # JAX's own heartbeats take 100 seconds
    running[victim].kill()
    finish([running[victim]])
    assert status == PEER_LOST
    assert f"process {1 - victim} of 2 did nothing for" in errors and f"Process {victim} does not answer" in errors


@pytest.mark.exhaustive
def test_a_second_run_of_several_processes_is_refused_in_all_of_them(tmp_path):
    with WorkdirLock(tmp_path):
        ended = finish(start(tmp_path, 2, 4, "train.steps=4", "mesh.fsdp=2"))
    assert [status for status, _, _ in ended] == [2, 2]
    assert "another run is training in" in ended[0][2] and "first process" in ended[1][2]


@pytest.mark.exhaustive
def test_several_processes_agree_on_the_checkpoint_before_a_damaged_one(tmp_path):
    overrides = ("train.checkpoint_every=3", "mesh.fsdp=2", "optimizer.schedule=constant")
    train(tmp_path, 2, 4, "train.steps=6", *overrides)
    victim = max((tmp_path / "checkpoints" / "6" / "optimizer" / "d").iterdir())
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    ended = train(tmp_path, 2, 4, "train.steps=7", *overrides)
    assert "6.damaged" in ended[0][1] and "resumed at step 3" in ended[0][1]
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(8))
