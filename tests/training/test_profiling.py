"""The trace of a real run tells of the model's own operations."""

import io

import pytest
from rich.console import Console

from lmx.config_files import read_config_file
from lmx.training.loop import train
from lmx.training.profiling import STEPS, WARM, readable
from tests.end_to_end.conftest import QUICKSTART


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        (
            "jit(train_step)/transpose(jvp(Transformer.hidden))/Transformer._run/decoder/decoder._scanned/while/body/"
            "closed_call/layers/block_0/block_0._residual/mlp/in/dot_general",
            "decoder/layers/block_0/mlp/in: dot_general (backward)",
        ),
        ("jit(train_step)/jvp(cross_entropy)/while/body/exp", "cross_entropy: exp"),
        ("jit(train_step)/transpose(jvp(remat(decoder)))/checkpoint/mlp/mlp/mul", "decoder/mlp: mul (backward)"),
        ("jit(train_step)/optimizer/add", "optimizer: add"),
        ("jit(train_step)/add", "step: add"),
    ],
)
def test_names_are_those_of_the_model(op_name, expected):
    assert readable(op_name) == expected


def profiled(workdir, steps):
    """What a run with a profile prints."""
    console = Console(record=True, width=200, file=io.StringIO())
    config = read_config_file(QUICKSTART, [f"--config.train.steps={steps}"])
    train(config, workdir, console=console, profile=True)
    return console.export_text()


@pytest.mark.slow
def test_a_run_is_traced_once_it_is_warm_and_names_what_costs_most(tmp_path):
    said = profiled(tmp_path / "run", WARM + STEPS + 2)
    assert f"profile of {STEPS} steps" in said and "ms a step" in said
    lines = [line for line in said.splitlines() if "ms a step" in line]
    costs = [float(line.split()[0]) for line in lines]
    assert costs == sorted(costs, reverse=True) and costs[-1] > 0
    assert any("decoder/" in line for line in lines)
    traces = [path.name for path in (tmp_path / "run" / "profile").rglob("*") if path.is_file()]
    assert any(name.endswith(".xplane.pb") for name in traces) and any(name.endswith(".json.gz") for name in traces)


@pytest.mark.slow
def test_a_run_that_is_too_short_says_so(tmp_path):
    assert "no profile" in profiled(tmp_path / "run", WARM)
    assert not (tmp_path / "run" / "profile").exists()
