"""The command line from a blank folder to an answer: training, resuming, and what stops them."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from rich.console import Console

import lmx as package
from lmx.config_files import read_config_file
from lmx.errors import ConfigError, TrainingError
from lmx.parallel.watchdog import Watchdog
from lmx.training import loop
from lmx.training.checkpoints import Checkpoints
from lmx.training.loop import train
from lmx.training.metrics import TIMINGS, Throughput, read_metrics
from tests.end_to_end.conftest import QUICKSTART, ROOT, lmx

SMALL = [
    f"--config.{setting}"
    for setting in (
        "model.num_layers=2",
        "model.embed_dim=16",
        "model.mlp_dim=32",
        "model.num_heads=2",
        "model.dropout=0.1",
        "data.length=16",
        "data.eval=builtin:python_manual[99%:]",
        "train.global_batch_size=4",
        "train.steps=12",
        "train.log_every=2",
        "train.eval_every=6",
        "train.checkpoint_every=4",
        "train.samples=1",
        "eval.max_batches=2",
    )
]


def small(*settings):
    return read_config_file(QUICKSTART, [*SMALL, *(f"--config.{setting}" for setting in settings)])


def run(workdir, *settings):
    return train(small(*settings), workdir, console=Console(quiet=True), devices=jax.devices()[:1])


def final_state(workdir):
    """What a run ends with: its last step, its parameters, and every number on the way but the timings."""
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step, params = checkpoints.latest_step(), checkpoints.restore_params()
    lines = [{k: v for k, v in line.items() if k not in TIMINGS} for line in read_metrics(workdir)]
    return step, params, lines


def test_the_workdir_holds_what_it_promises(tiny_run):
    names = {path.name for path in tiny_run.iterdir()}
    promised = {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "tokenizer", "report.html", "samples.txt"}
    assert promised <= names
    contents = json.loads((tiny_run / "config.json").read_text())
    assert contents["config"]["model"]["vocab_size"] == 261
    assert {"jax", "flax"} <= set(contents["versions"]) and contents["device"]
    lines = read_metrics(tiny_run)
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    assert lines[-1]["step"] == 20 and lines[-1]["tokens_per_second"] > 0
    evaluations = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert evaluations[0] > 5.4 and evaluations[-1] < 0.75 * evaluations[0]
    assert "<svg" in (tiny_run / "report.html").read_text() and "http" not in (tiny_run / "report.html").read_text()


def test_the_same_command_again_says_complete_and_changes_nothing(tiny_run):
    before = (tiny_run / "metrics.jsonl").read_text()
    again = lmx("train", "--config", QUICKSTART, "--workdir", tiny_run)
    assert "complete" in again.stdout
    assert (tiny_run / "metrics.jsonl").read_text() == before


def test_generate_and_eval_from_the_command_line(tiny_run):
    written = lmx("generate", "--workdir", tiny_run, "--prompt", "The statement", "--max-new-tokens", 8)
    assert written.stdout.startswith("The statement")
    scores = lmx("eval", "--workdir", tiny_run)
    loss = float(scores.stdout.split("eval/loss = ")[1].split()[0])
    assert loss == pytest.approx(read_metrics(tiny_run)[-1]["eval/loss"], rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("schedule_free_adamw", marks=pytest.mark.slow)])
def test_resumed_equals_unbroken_to_the_bit(tmp_path, optimizer):
    settings = [f"optimizer.name={optimizer}", "optimizer.schedule=constant"]
    run(tmp_path / "unbroken", *settings)
    run(tmp_path / "resumed", *settings, "train.steps=4")
    result = run(tmp_path / "resumed", *settings)
    assert result.step == 12 and result.ended == "complete"
    step, params, lines = final_state(tmp_path / "unbroken")
    step_resumed, params_resumed, lines_resumed = final_state(tmp_path / "resumed")
    assert step == step_resumed == 12
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(params_resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    # The shorter command also evaluated at its own end, step 4; apart from that, line by line the same.
    shorter = {name for name in lines_resumed[2] if name.startswith("eval/")}
    assert lines_resumed[2]["step"] == 4 and shorter
    lines_resumed[2] = {name: value for name, value in lines_resumed[2].items() if name not in shorter}
    assert lines_resumed == lines


def test_more_steps_go_on_from_where_it_was(tmp_path):
    run(tmp_path, "train.steps=4")
    result = run(tmp_path, "train.steps=8")
    assert result.step == 8
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 2, 4, 6, 8]


def test_a_signal_saves_and_the_same_command_goes_on(tmp_path):
    command = [sys.executable, "-m", "lmx", "train", "--config", QUICKSTART, "--workdir", str(tmp_path), *SMALL]
    command += [
        "--config.train.steps=100000",
        "--config.train.eval_every=100000",
        "--config.train.checkpoint_every=100000",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(read_metrics(tmp_path) if (tmp_path / "metrics.jsonl").exists() else []) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        saved = checkpoints.latest_step()
    assert saved - 2 < read_metrics(tmp_path)[-1]["step"] <= saved  # a stop writes no line of its own
    result = run(tmp_path, f"train.steps={saved + 2}", "train.eval_every=100000", "train.checkpoint_every=100000")
    assert result.step == saved + 2


def test_another_config_is_refused_with_the_fields_that_differ(tmp_path):
    run(tmp_path, "train.steps=2")
    before = sorted(os.listdir(tmp_path))
    arguments = ["--config", QUICKSTART, "--workdir", tmp_path, *SMALL, "--config.optimizer.learning_rate=0.5"]
    refused = lmx("train", *arguments, check=False)
    assert refused.returncode == 2
    assert "optimizer.learning_rate is 0.003 there and 0.5 here" in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr and sorted(os.listdir(tmp_path)) == before


def test_a_loss_that_is_not_finite_names_the_step_and_the_last_good_checkpoint(tmp_path):
    settings = ["optimizer.name=sgd", "optimizer.schedule=constant", "optimizer.warmup_steps=0", "train.steps=200"]
    with pytest.raises(TrainingError, match=r"of step \d+ is not finite.*optimizer.learning_rate"):
        run(tmp_path, *settings, "optimizer.learning_rate=1e30", "optimizer.clip_norm=0", "train.checkpoint_every=1")
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        params = checkpoints.restore_params()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_early_stop_when_the_metric_has_converged(tmp_path):
    settings = ["train.early_stop_evals=2", "train.early_stop_delta=100.0", "train.eval_every=2"]
    result = run(tmp_path, *settings)
    assert (result.ended, result.step) == ("converged", 4)
    lines = (tmp_path / "metrics.jsonl").read_text()
    again = run(tmp_path, *settings)
    assert (again.ended, again.step) == ("converged", 4) and (tmp_path / "metrics.jsonl").read_text() == lines


def test_a_prompt_without_room_after_it_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"train.sample_prompt is \d+ tokens"):
        run(tmp_path / "run", f"train.sample_prompt={'a' * 300}")
    assert not (tmp_path / "run").exists()


def test_what_a_run_waits_for_is_time_of_its_steps_and_compiling_is_not_a_standstill(tmp_path, monkeypatch):
    """Before a save the host waits for the steps under way: only then the clock of the speed may stand still."""
    events = []

    def noted(owner, name):
        method = getattr(owner, name)

        def called(self, *args, **kwargs):
            events.append(name)
            return method(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, called)

    for owner, names in {
        loop._Run: ["_check_pending", "_save", "_advance"],
        Throughput: ["pause"],
        Watchdog: ["rest", "beat"],
    }.items():
        for name in names:
            noted(owner, name)
    run(tmp_path, "train.steps=4", "train.log_every=4", "train.checkpoint_every=1")
    saves = [events[i + 1 : i + 3] for i, name in enumerate(events) if name == "_save"]
    assert saves == [["_check_pending", "pause"]] * 4
    clock = [name for name in events if name in ("rest", "beat", "_advance")]
    first = clock.index("_advance")
    assert clock[0] == "rest" and clock[first : first + 3] == ["_advance", "rest", "beat"]
    assert clock.count("rest") == 2  # the first evaluation and the first step


def test_the_loaded_model_scores_what_training_reported(tiny_run):
    lm = package.load(tiny_run)
    logits = np.asarray(lm.logits([lm.encode("The statement")]))
    assert logits.shape == (1, 14, 261) and logits.dtype == np.float32
    assert len(lm.generate("def ", max_new_tokens=5)) > 0
