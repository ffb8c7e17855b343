"""A plan says what the compiled program says, and its arithmetic can be done by hand."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from lmx.cli import main
from lmx.config_files import read_config_file
from lmx.errors import ConfigError
from lmx.models.heads import num_params
from lmx.parallel.hardware import HARDWARE
from lmx.parallel.sharding import put_batch
from lmx.planning.plan import Times, bandwidth, make_plan
from lmx.planning.program import abstract_batch, abstract_experiment, as_it_runs
from lmx.planning.search import first_that_fits, meshes, ranked_meshes, search
from lmx.planning.show import rows_of
from lmx.planning.targets import Target, open_target
from lmx.training.experiment import build
from lmx.training.initial import initial_state
from lmx.training.loop import compiled_train_step

ROOT = Path(__file__).parents[2]
ONE = ("data.train=builtin:python_manual[:1%]", "data.eval=builtin:python_manual[99%:]")
SMALL = ("model.num_layers=2", "model.embed_dim=64", "model.num_heads=2", "model.mlp_dim=128", "data.length=64")
TINY = [f"--config.{setting}" for setting in (*SMALL, "train.global_batch_size=8", *ONE)]


def config_of(name, *overrides):
    return read_config_file(str(ROOT / "experiments" / name), [*TINY, *(f"--config.{one}" for one in overrides)])


@pytest.fixture(scope="module")
def plan():
    return make_plan(config_of("gpt2.py:tiny", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"), open_target("here"))


def test_the_bytes_are_those_of_the_program_that_a_run_would_use(plan, tmp_path):
    """The plan needs no data; a run reads the text, and its step is compiled for real arrays."""
    config = plan.config
    experiment = build(config, tmp_path, Console(quiet=True))
    optimizer = experiment.optimizer()
    state, _ = initial_state(experiment, optimizer, None, Console(quiet=True))
    step = compiled_train_step(experiment, optimizer, state)
    batch = put_batch(next(experiment.train_batches()), experiment.mesh)
    found = step.lower(state, batch).compile().memory_analysis()
    total = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    total += found.temp_size_in_bytes + found.generated_code_size_in_bytes
    assert abs(plan.memory.total / total - 1) < 0.1
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
    assert plan.memory.parameters + plan.memory.optimizer == held
    memory = plan.memory
    parts = (memory.gradients, memory.activations, memory.temporaries, memory.batch)
    assert min(parts) > 0 and abs(sum(parts) + held - memory.total) < 1


@pytest.mark.parametrize(
    "name", ["gpt2.py:tiny", "bert.py:tiny", "t5.py:tiny", "switch.py:tiny", "seq2seq.py:reverse", "classify.py:tiny"]
)
def test_a_batch_has_the_arrays_that_the_objective_makes(name):
    overrides = [] if name.startswith("seq2seq") else TINY
    config = read_config_file(str(ROOT / "experiments" / name), overrides)
    target = Target("here", tuple(jax.devices()[:1]), None)
    experiment = abstract_experiment(config.replace(mesh={"data": 1}), target)
    batch = abstract_batch(experiment)
    assert {n: x.shape[1] for n, x in batch.items() if len(x.shape) > 1} == {
        n: length for n, length in experiment.objective.lengths.items() if n in batch
    }
    assert all(x.shape[0] == config.train.global_batch_size for x in batch.values())
    jax.eval_shape(experiment.objective.weights, batch)


def test_parameters_and_flops_by_hand(plan):
    assert sum(plan.parameters.values()) == num_params(plan.program.state.params)
    layers, width, mlp, length = 2, 64, 128, 64
    vocab = plan.program.experiment.config.model.vocab_size
    assert plan.parameters["feed-forward"] == layers * (2 * width * mlp + mlp + width)
    assert plan.parameters["attention"] == layers * 4 * (width * width + width)
    products = 2 * layers * (4 * width * width + 2 * width * mlp) + 2 * width * vocab
    attention = layers * 4 * width * (length + 1) / 2
    assert plan.flops_per_token == products + attention
    assert plan.tokens == 8 * 64


def test_what_tensor_parallelism_sends_is_there(plan):
    assert {"tensor", "fsdp"} <= {axis for one in plan.collectives for axis in one.axes}
    rows = {row["name"]: row["value"] for row in rows_of(plan)}
    assert rows["memory"] == plan.memory.total and rows["mesh/tensor"] == 2


def test_the_step_is_bound_by_the_longest_and_the_idle_stages():
    times = Times(matmul=3.0, memory=1.0, network=2.0, bubble=0.25)
    assert (times.step, times.limit) == (4.0, "matmul")


def test_links_of_a_node_and_beyond():
    from types import SimpleNamespace

    h100 = next(one for one in HARDWARE if one.name == "h100")
    shape = {"data": 8, "fsdp": 4, "tensor": 2}
    mesh = SimpleNamespace(axis_names=tuple(shape), shape=shape)
    within = SimpleNamespace(axes=("fsdp",), size=4)
    across = SimpleNamespace(axes=("data",), size=8)
    both = SimpleNamespace(axes=("data", "fsdp"), size=32)
    assert bandwidth(within, mesh, h100) == h100.link_bandwidth
    assert bandwidth(across, mesh, h100) == h100.network_bandwidth
    assert bandwidth(both, mesh, h100) == 4 * h100.network_bandwidth
    outer_and_inner = SimpleNamespace(axes=("data", "tensor"), size=16)  # a node holds two of its members
    assert bandwidth(outer_and_inner, mesh, h100) == 2 * h100.network_bandwidth


def test_the_body_and_the_vocabulary_are_those_of_a_run(tmp_path):
    import transformers

    published = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(published).save_pretrained(tmp_path)
    config = config_of("bert_classify.py")
    config, said = as_it_runs(config.replace(train={"init_from": str(tmp_path)}))
    model = abstract_experiment(config, open_target("here")).model.config
    assert (model.num_layers, model.vocab_size, model.position) == (3, 99, "learned") and "not the one that" in said[0]
    _, said = as_it_runs(config_of("bert_classify.py", "train.init_from=nobody/has-this"))
    assert "is not here" in said[0] and "vocabulary is known once" in said[1]
    assert as_it_runs(config_of("gpt2.py:tiny"))[1] == []


def test_a_run_that_does_not_fit_is_told_what_would():
    """On a device whose memory lies just below what the run takes."""
    config = config_of("gpt2.py:tiny", "mesh.data=1", "data.length=128", "model.num_layers=8")
    target = Target("small", tuple(jax.devices()[:1]), next(one for one in HARDWARE if one.name == "v5e"))
    needed = make_plan(config, target).memory.total
    target = replace(target, hardware=replace(target.hardware, memory=needed * 0.8))
    assert make_plan(config, target).memory.fits is False
    change, better = first_that_fits(config, target)
    assert better.memory.fits and better.memory.total <= 0.8 * needed
    assert better.config == change.config and "--config." in str(change)


def test_a_search_is_written_down(tmp_path, monkeypatch, plan):
    monkeypatch.setattr("lmx.planning.command.search", lambda config, target, told: [plan, plan])
    command = ["plan", "--config", str(ROOT / "experiments/gpt2.py:tiny"), "--search", *TINY]
    assert main([*command, "--json", str(tmp_path / "plan.json")]) == 0
    first, second = json.loads((tmp_path / "plan.json").read_text())["search"]
    assert first == second and "--config.mesh.tensor=2" in first["flags"]
    assert {row["name"]: row["value"] for row in first["rows"]}["mesh/tensor"] == 2


def test_a_folder_is_no_file_to_write_and_is_refused_before_the_work(tmp_path, capsys):
    assert main(["plan", "--config", str(ROOT / "experiments/gpt2.py:tiny"), "--json", str(tmp_path), *TINY]) == 2
    output = capsys.readouterr()
    assert "it is a folder" in output.err and not output.out


@pytest.mark.slow
def test_a_search_ranks_what_it_compiled():
    config = config_of("gpt2.py:tiny")
    target = Target("v5e", tuple(jax.devices()[:4]), next(one for one in HARDWARE if one.name == "v5e"))
    found = search(config, target, remats=("none",))
    assert len(found) > 2 and all(one.memory.fits for one in found)
    steps = [one.times.step for one in found]
    assert steps == sorted(steps) and len({str(one.program.experiment.mesh.shape) for one in found}) == len(found)


def test_meshes_that_do_not_hold_the_state_come_last():
    config = config_of("gpt2.py:tiny", "train.global_batch_size=64")
    target = Target("v5e", tuple(jax.devices()[:8]), next(one for one in HARDWARE if one.name == "v5e"))
    assert {"data", "fsdp"} <= {axis for sizes in meshes(config, 8) for axis, size in sizes.items() if size == 8}
    state = 16 * sum(make_plan(config, target).parameters.values())
    small = replace(target, hardware=replace(target.hardware, memory=state / 3))
    ranked = ranked_meshes(config, small)
    room = [sizes["data"] <= 2 for sizes in ranked]  # a third of the state, on at least a quarter of the devices
    assert any(room) and room == sorted(room, reverse=True)


def test_under_pmap_there_is_one_mesh():
    target = Target("v5e", tuple(jax.devices()[:8]), next(one for one in HARDWARE if one.name == "v5e"))
    (only,) = ranked_meshes(config_of("gpt2.py:tiny", "train.strategy=pmap"), target)
    assert only["data"] == 8


def test_every_mesh_that_is_tried_suits_the_sizes():
    config = config_of("switch.py:tiny", "train.global_batch_size=64")
    shapes = list(meshes(config, 8))
    assert {"expert": 2}.items() <= {k: v for s in shapes for k, v in s.items() if v == 2}.items()
    assert all(np.prod(list(shape.values())) == 8 for shape in shapes)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("v5q:4x4", "'v5q:4x4' is no kind of device; did you mean 'v5p'"),
        ("here:4", "no kind of device; write"),
        ("v5p", "lacks how many devices"),
        ("v5p:-1x2x2", "'-1x2x2' is not how many devices"),
        ("h100:0", "'0' is not how many"),
        ("v5p:64", "chips along each dimension"),
        ("h100:4x4", "'4x4' is not how many"),
        ("h100:12", "nodes of 8"),
        ("v5p:4x4", "v5p have 3 dimensions"),
        ("v5e:4x6", "no such slice; v5e comes as 1x1, 2x2, 2x4"),
        ("v5e:32x32", "no such slice"),
        ("v5p:8x4x4", "A <= B <= C"),
        ("v4:4x6x8", "no such slice"),
        ("v4:16x16x20", "up to 4,096 chips"),
    ],
)
def test_devices_that_there_are_not(devices, message):
    with pytest.raises(ConfigError, match=message):
        open_target(devices)


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    json_file, page = tmp_path / "plan.json", tmp_path / "plan.html"
    command = ["plan", "--config", str(ROOT / "experiments/gpt2.py:tiny"), "--shardings", *TINY]
    assert main([*command, "--config.mesh.tensor=2", "--json", str(json_file), "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    places = {one["parameter"]: one for one in json.loads(json_file.read_text())["shardings"]}
    assert ["vocab", "embed"] == places["embeddings/tokens/table"]["dimensions"]
    rows = {row["name"]: row["value"] for row in json.loads(json_file.read_text())["rows"]}
    assert f"{rows['memory'] / 2**30:.3f}" in printed
    assert "embeddings/tokens/table" in printed and "tensor" in printed
    html = page.read_text()
    assert "embeddings/tokens/table" in html and "<svg" in html and "http" not in html


def test_out_of_memory_is_answered_with_the_plan(tmp_path, capsys, monkeypatch):
    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")

    monkeypatch.setattr("lmx.training.loop.train", exhausted)
    command = ["train", "--config", str(ROOT / "experiments/gpt2.py:tiny"), "--workdir", str(tmp_path), *TINY]
    assert main(command) == 2
    output = capsys.readouterr()
    assert "memory of a device" in output.out and "parameters" in output.out
    assert "--config.model.remat=full" in output.err and "RESOURCE_EXHAUSTED" in output.err
