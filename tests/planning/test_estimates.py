"""Without a compiler a plan is an estimate: near what a compiler says, and never without saying that it is one."""

import importlib.util
import json
from pathlib import Path

import jax
import pytest

from lmx.cli import main
from lmx.config_files import read_config_file
from lmx.errors import ConfigError
from lmx.parallel.hardware import HARDWARE
from lmx.planning.plan import make_plan
from lmx.planning.targets import AbsentDevice, Target, open_target

ROOT = Path(__file__).parents[2]
H100 = next(one for one in HARDWARE if one.name == "h100")
SIZES = ("num_layers=4", "embed_dim=256", "num_heads=8", "mlp_dim=1024", "max_length=256", "vocab_size=1000")
SETTINGS = [f"--config.model.{size}" for size in SIZES]
SETTINGS += ["--config.data.length=256", "--config.train.global_batch_size=16"]


def config_of(name, *overrides):
    return read_config_file(str(ROOT / "experiments" / name), [*SETTINGS, *(f"--config.{one}" for one in overrides)])


def estimate(name, *overrides):
    """The plan for eight devices that are not there."""
    absent = tuple(AbsentDevice(i, H100.kinds[0], "gpu") for i in range(8))
    return make_plan(config_of(name, *overrides), Target("absent", absent, H100, lacks="gpu"))


def both(name, *overrides):
    """The plan as compiled for eight devices, and the estimate."""
    compiled = make_plan(config_of(name, *overrides), Target("here", tuple(jax.devices()), H100))
    return compiled, estimate(name, *overrides)


def sent(plan, kind):
    return sum(one.sent for one in plan.collectives if one.kind == kind)


# On a CPU what is to be scattered is reduced in full, so those two kinds are not compared.
CASES = {
    "fsdp": ("gpt2.py:tiny", ("mesh.data=1", "mesh.fsdp=8"), "all-gather"),
    "data": ("gpt2.py:tiny", ("mesh.data=8",), "all-reduce"),
    "tensor": ("gpt2.py:tiny", ("mesh.data=1", "mesh.tensor=8"), "all-gather"),
    "expert": ("switch.py:tiny", ("mesh.data=1", "mesh.expert=4", "mesh.fsdp=2"), "all-gather"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_estimates_are_near_what_a_compiler_says(case):
    name, overrides, kind = CASES[case]
    compiled, estimated = both(name, *overrides)
    assert 0.85 < sent(estimated, kind) / sent(compiled, kind) < 1.15
    assert 0.65 < estimated.memory.total / compiled.memory.total < 1.1
    for part in ("parameters", "optimizer", "batch", "gradients", "activations"):
        assert getattr(estimated.memory, part) == getattr(compiled.memory, part)
    assert estimated.times.matmul == compiled.times.matmul


@pytest.mark.slow
def test_experts_and_stages_send_what_their_axes_need():
    compiled, experts = both("switch.py:tiny", "mesh.data=1", "mesh.expert=4", "mesh.fsdp=2")
    _, stages = both("gpt2.py:tiny", "mesh.data=1", "mesh.fsdp=2", "mesh.stage=4")
    for plan in (compiled, experts):
        assert ("all-to-all", ("expert",)) in {(one.kind, one.axes) for one in plan.collectives}
    permuted = next(one for one in stages.collectives if one.kind == "collective-permute")
    rows, length, width, float32 = 8, 256, 256, 4
    assert (permuted.axes, permuted.sent) == (("stage",), 2 * rows * length * width * float32)


@pytest.mark.parametrize(
    ("devices", "extra", "count"), [("v5e:4x4", "plan", 16), ("tpu7x:2x2x1", "plan", 8), ("h100:8", "gpu", 8)]
)
def test_devices_without_a_compiler_are_still_counted(devices, extra, count, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    target = open_target(devices)
    assert (target.lacks, len(target.devices)) == (extra, count)


def test_an_estimate_says_that_it_is_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "plan.json"
    command = ["plan", "--config", str(ROOT / "experiments/gpt2.py:tiny"), "--devices", "h100:8", "--json", str(path)]
    assert main([*command, *SETTINGS]) == 0
    printed = capsys.readouterr().out
    assert "pip install 'lmx[gpu]'" in printed and "estimated" in printed and "as compiled" not in printed
    assert json.loads(path.read_text())["compiled"] is False


def test_a_folder_that_is_not_there_is_told_of_before_the_work(capsys):
    command = ["plan", "--config", str(ROOT / "experiments/gpt2.py:tiny"), "--json", "no/such/folder/plan.json"]
    assert main(command) == 2
    assert "there is no folder no/such/folder" in capsys.readouterr().err


def test_what_is_offloaded_takes_none_of_the_devices_memory():
    estimated, offloaded = (
        estimate("gpt2.py:tiny", "mesh.data=8", f"optimizer.offload={on}") for on in ("false", "true")
    )
    assert offloaded.memory.optimizer == 0
    assert offloaded.memory.total == estimated.memory.total - estimated.memory.optimizer


def test_attention_across_stacks_is_named_too():
    settings = ("model.dropout=0", "model.attention_dropout=0", "model.dtype=bfloat16", "model.head_dim=128")
    forms = estimate("t5.py:base", *settings).program.experiment.attention_forms()
    assert [form.name for form in forms] == ["plain", "cudnn"]  # a bias by distance takes some of a head's width
    assert "at most 112 wide" in forms[0].reason


def test_the_attention_that_is_named_is_the_one_that_rows_with_a_prefix_get():
    settings = ("model.dropout=0", "model.attention_dropout=0", "model.dtype=bfloat16")
    plain = estimate("t5.py:base", *settings).program.experiment.attention_forms()
    assert "cuDNN" in str(plain[0])
    (with_prefix,) = estimate("prefix_lm.py:base", *settings).program.experiment.attention_forms()
    assert with_prefix.name == "plain" and "prefix" in str(with_prefix)
    with pytest.raises(ConfigError, match="prefix"):
        estimate("prefix_lm.py:base", *settings, "model.attention=flash")
