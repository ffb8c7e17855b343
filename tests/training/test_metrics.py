import errno
import importlib.util
import json
import mmap

import jax.numpy as jnp
import numpy as np
import pytest

from lmx.errors import CheckpointError
from lmx.training import metrics
from lmx.training.metrics import MetricsWriter, Throughput, read_metrics


def write(workdir, steps, resume_step=0):
    with MetricsWriter(workdir, resume_step) as writer:
        for step in steps:
            writer.write(step, {"train/loss": 10 / step})


def test_a_line_a_step(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(10, {"train/loss": jnp.float32(0.5), "tokens_per_second": 1000})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # on disk before the file is closed
        writer.write(20, {"train/loss": np.float64(0.25), "eval/loss": 0.75})
    assert json.loads(lines[0]) == {"step": 10, "train/loss": 0.5, "tokens_per_second": 1000.0}
    assert read_metrics(tmp_path)[1] == {"step": 20, "train/loss": 0.25, "eval/loss": 0.75}


def test_resuming_drops_lost_steps_and_a_torn_line(tmp_path):
    write(tmp_path, [10, 20, 30, 40])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 50, "train/l')
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20, 30, 40]
    write(tmp_path, [30, 40], resume_step=25)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 30, 40]
    assert [path.name for path in tmp_path.glob("metrics*")] == ["metrics.jsonl"]


def test_a_new_run_keeps_nothing(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    write(tmp_path, [1, 2, 3])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, {"train/loss": 0.0})
    assert [line["step"] for line in writer.resumed] == [1, 2]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_no_line_spans_two_pages(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 200):
            writer.write(step, {f"train/{i}": step / 7 for i in range(step % 40)})
    content, end = (tmp_path / "metrics.jsonl").read_bytes(), 0
    for line in content.splitlines(keepends=True):
        start, end = end + len(line) - len(line.lstrip()), end + len(line)
        assert start // mmap.PAGESIZE == (end - 1) // mmap.PAGESIZE
    assert end > 10 * mmap.PAGESIZE and [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 200))


def test_a_torn_line_may_stop_inside_a_character(tmp_path):
    write(tmp_path, [1])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write('{"step": 2, "é'.encode()[:-1])
    write(tmp_path, [2], resume_step=1)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_other_files_are_errors_and_left_alone(tmp_path):
    with pytest.raises(CheckpointError, match="no workdir of `lmx train`"):
        read_metrics(tmp_path)
    for text in ("hello\n", "[1, 2]\n", '{"loss": 1}\n{"step": 2}\n'):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(CheckpointError, match="line 1 of .* is no metrics line"):
            MetricsWriter(tmp_path, resume_step=5)
        assert (tmp_path / "metrics.jsonl").read_text() == text


def test_tensorboard_files_hold_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    write(tmp_path, [1, 2])
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert events.count(b"train/loss") == 2
    assert np.float32(10).tobytes() in events


def test_without_tensorboard_there_is_one_notice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    write(tmp_path, [1, 2])
    assert capsys.readouterr().out.count("tensorboardX is not installed") == 1
    assert len(read_metrics(tmp_path)) == 2
    assert not (tmp_path / "tensorboard").exists()


def test_throughput_leaves_pauses_out(monkeypatch):
    clock = iter([0.0, 2.0, 12.0, 15.0, 15.0, 17.0, 17.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    throughput = Throughput(flops_per_token=100.0, peak=4000.0)  # at 0
    throughput.count(30)
    throughput.pause()  # at 2
    throughput.resume()  # at 12
    throughput.count(20)
    assert throughput.read() == {  # 50 in 2 + 3 seconds
        "tokens_per_second": 10.0,
        "model_flops_utilization": 0.25,
        "input_wait": 0.0,
    }
    throughput.count(10)
    assert throughput.read()["tokens_per_second"] == 5.0  # 10 in 2 seconds


def test_utilization_needs_a_known_device():
    assert set(Throughput(flops_per_token=100.0, peak=None).read()) == {"tokens_per_second", "input_wait"}


def test_waiting_for_input_is_a_fraction_of_the_time_that_is_counted(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 4.0, 4.0, 14.0, 14.0, 15.0, 16.0, 16.0, 16.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    throughput = Throughput()  # at 0
    with throughput.waiting():  # 1 to 3
        pass
    assert throughput.read()["input_wait"] == 0.5  # 2 of 4 seconds; read at 4
    throughput.pause()  # at 14
    throughput.resume()  # at 14
    with throughput.waiting():  # 15 to 16
        pass
    assert throughput.read()["input_wait"] == 1 / 12  # of 10 + 2; read at 16


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_without_room_does_not_stop_a_run(tmp_path, capsys):
    pytest.importorskip("tensorboardX")

    def full(event):
        raise OSError(errno.ENOSPC, "no room")

    with MetricsWriter(tmp_path) as writer:
        events = writer._tensorboard.file_writer.event_writer
        events._ev_writer.write_event = full
        writer.write(1, {"train/loss": 1.0})
        events._worker.join(30)
        for step in range(2, 30):  # more than its queue takes
            writer.write(step, {"train/loss": 1.0})
    assert capsys.readouterr().out.count("No more TensorBoard files") == 1
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 30))
