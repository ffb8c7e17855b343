"""What no engine should ever hear of is refused, and nothing is written."""

import os
import subprocess
import sys

import pytest

from lmx.cli import main
from lmx.parallel.hardware import RENTED, read_devices
from tests.launching.jobs import arguments, command, launch, refused

ENGINES = ("slurm", "gke", "skypilot")


@pytest.mark.parametrize(
    ("name", "devices", "hosts", "chips_per_host"),
    [
        ("v4:2x2x4", 16, 4, 4),
        ("v5e:1x1", 1, 1, 1),
        ("v5e:2x4", 8, 2, 4),
        ("v5p:2x2x1", 4, 1, 4),
        ("v5p:8x8x16", 1024, 256, 4),
        ("v6e:16x16", 256, 64, 4),
        ("tpu7x:2x2x2", 16, 2, 4),  # two devices a chip
        ("h100:4", 4, 1, 4),
        ("h100:64", 64, 8, 8),
    ],
)
def test_machines_of_a_topology(name, devices, hosts, chips_per_host):
    found = read_devices(name)
    assert (found.count, found.hosts, found.chips_per_host) == (devices, hosts, chips_per_host)


def test_machines_are_those_of_xpk():
    """Google's own tool for GKE, where it is installed, has the same label and as many machines for each topology."""
    table = pytest.importorskip("xpk.core.system_characteristics").UserFacingNameToSystemCharacteristics
    checked = set()
    for system in table.values():
        kind = next((name for name, rented in RENTED.items() if rented.gke == system.gke_accelerator), None)
        if kind and RENTED[kind].torus:
            found = read_devices(f"{kind}:{system.topology}")
            assert (found.hosts, found.chips_per_host) == (system.vms_per_slice, system.chips_per_vm)
            assert len(found.shape) == RENTED[kind].torus
            name = system.device_type  # "v5p-2048": as the cloud, and so SkyPilot, counts
            ours = RENTED[kind].skypilot.format(chips=found.chips, cores=2 * found.chips)
            assert ours in ("", f"tpu-{name}")
            checked.add(kind)
    assert checked == {"v4", "v5e", "v5p", "v6e", "tpu7x"}


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("v5q:4x4", "did you mean 'v5p'"),
        ("v5e:4x4x1", "topologies of v5e have 2 dimensions, as in v5e:4x4"),
        ("v5p:1x4x4", "there is no such slice; v5p comes as 2x2x1, and AxBxC"),
        ("h100:12", "comes in nodes of 8"),
        ("h100:64", "train.global_batch_size (16) does not divide over mesh data x fsdp x expert = 64"),
    ],
)
def test_devices_that_do_not_fit(capsys, devices, message):
    for engine in ENGINES:
        assert message in refused(capsys, engine, devices)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.mesh.tensor=3"], "needs a multiple of 3 devices, but there are 16"),
        (["--config.mesh.stage=16"], "do not divide over mesh.stage=16"),
        (["--config.train.strategy=jit"], "computes on one device, but the mesh has 16"),
        (["--config.mesh.rules=('embd=fsdp',)"], "embd"),
        (["--config.train.stesp=3"], "did you mean 'train.steps'?"),
        (["--name", "Big_Run"], "--name 'Big_Run' must be a-z"),
        (["--name", "x" * 41], "at most 40"),
        (["--env", "A-B=1"], "--env 'A-B=1' is not NAME=VALUE"),
        (["--max-restarts", "-1"], "--max-restarts must be 0 or more"),
    ],
)
def test_jobs_that_would_fail_once_started(capsys, tmp_path, flags, message):
    output = tmp_path / "job"
    output.write_text("an older job")
    for engine in ENGINES:
        assert message in refused(capsys, engine, "h100:16", "--output", str(output), *flags)
    assert output.read_text() == "an older job" and list(tmp_path.iterdir()) == [output]


def test_rows_that_machines_cannot_share(capsys):
    flags = ["--config.mesh.tensor=6", "--config.train.global_batch_size=12"]
    assert "4 parts, which 3 machines cannot share evenly" in refused(capsys, "slurm", "h100:24", *flags)


def test_sizes_for_the_kind_of_device_are_taken(capsys):
    flags = ["--config.mesh.on=('h100: fsdp=-1', 'v5p: tensor=3')"]
    launch(capsys, "gke", "h100:16", *flags)
    assert "3 devices, but there are 16" in refused(capsys, "gke", "v5p:2x2x4", *flags).replace("multiple of ", "")


def test_no_device_is_looked_for():
    """Where JAX would fail to find any, a job is made all the same."""
    words = [sys.executable, "-m", "lmx", *arguments("gke", "v5p:2x2x4")]
    done = subprocess.run(words, env=os.environ | {"JAX_PLATFORMS": "nowhere"}, capture_output=True, text=True)
    assert done.returncode == 0 and "tpu-v5p-slice" in done.stdout, done.stderr


def test_an_unknown_engine_names_the_nearest(capsys):
    assert "'slrum' is no engine; did you mean 'slurm'?" in refused(capsys, "slrum", "h100:8")


@pytest.mark.parametrize(
    ("engine", "flags", "message"),
    [
        ("gke", ["--partition", "a"], "--partition is an option of slurm, not of gke"),
        ("slurm", ["--spot"], "--spot is an option of gke and skypilot, not of slurm"),
        ("skypilot", ["--image", "a"], "--image is an option of gke, not of skypilot"),
    ],
)
def test_an_option_of_another_engine_is_not_dropped(capsys, engine, flags, message):
    assert message in refused(capsys, engine, "h100:8", *flags)


@pytest.mark.parametrize("engine", ["gke", "skypilot"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir", "runs/one"], "--workdir runs/one is on none of the mounts (/runs)"),
        (["--workdir", "/runs/../tmp"], "is on none of the mounts"),
        (["--mount", "gs://bucket"], "--mount 'gs://bucket' is not SOURCE:/PATH"),
        (["--mount", "claim:runs"], "--mount 'claim:runs' is not SOURCE:/PATH"),
    ],
)
def test_a_workdir_that_would_be_lost(capsys, engine, flags, message):
    assert message in refused(capsys, engine, "h100:8", *flags)


@pytest.mark.parametrize(("engine", "suffix"), [("slurm", ".sbatch"), ("gke", ".yaml"), ("skypilot", ".yaml")])
def test_a_dry_run_shows_what_it_writes_and_submits_nothing(capsys, tmp_path, engine, suffix):
    shown, said = launch(capsys, engine, "h100:16", "--output", str(tmp_path))
    assert (tmp_path / f"gpt2-tiny{suffix}").read_text() == shown
    assert "gpt2-tiny: 16 device(s) of h100 on 2 machine(s) of 8 chip(s)" in said and "nothing was submitted" in said
    assert len(list(tmp_path.iterdir())) == 1
    for word in command():
        assert word in shown
    assert "there is no folder" in refused(capsys, engine, "h100:16", "--output", f"{tmp_path}/a/b")


@pytest.mark.parametrize(("engine", "tool"), [("slurm", "srun"), ("gke", "kubectl"), ("skypilot", "sky")])
def test_submitting_without_the_engine_says_what_is_missing(capsys, monkeypatch, tmp_path, engine, tool):
    monkeypatch.setenv("PATH", str(tmp_path))
    given = arguments(engine, "h100:16", "--submit")
    given[given.index("--workdir") + 1] = str(tmp_path / "run") if engine == "slurm" else "/runs/one"
    assert main(given) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert tool in said and "nothing was submitted" in said
    assert list(tmp_path.iterdir()) == []
