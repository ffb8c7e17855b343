"""The task is read back, checked by SkyPilot where it is installed, and its shell is run by a real one."""

import json
import os
import subprocess

import pytest
import yaml

from lmx.parallel.processes import environment
from tests.launching.jobs import AWKWARD, command, fake, launch, refused

KINDS = [
    ("v4:2x2x4", "tpu-v4-32", 1),  # the cloud counts cores of v4 and v5p, two a chip
    ("v5e:4x4", "tpu-v5litepod-16", 1),
    ("v5p:2x2x4", "tpu-v5p-32", 1),
    ("v6e:4x4", "tpu-v6e-16", 1),
    ("h100:16", "H100:8", 2),
    ("h100:4", "H100:4", 1),
    ("a100:8", "A100-80GB:8", 1),
    ("b200:16", "B200:8", 2),
]


@pytest.mark.parametrize(("devices", "accelerators", "nodes"), KINDS)
def test_accelerators_and_nodes(capsys, devices, accelerators, nodes):
    text, said = launch(capsys, "skypilot", devices, "--spot", "--infra", "gcp/us-central1", "--max-restarts", "3")
    task = yaml.safe_load(text)
    assert (task["resources"]["accelerators"], task["num_nodes"]) == (accelerators, nodes)
    assert task["resources"]["use_spot"] is True and task["resources"]["infra"] == "gcp/us-central1"
    recovery = {"max_restarts_on_errors": 3, "recover_on_exit_codes": [143]}
    assert task["resources"]["job_recovery"] == recovery
    tpu = devices.startswith("v")
    assert task["setup"].endswith(f'/bin/pip install -e ".[{"tpu" if tpu else "gpu"}]"\n')
    assert ("runtime_version" in task["resources"].get("accelerator_args", {})) == tpu
    assert task["file_mounts"] == {"/runs": {"source": "gs://bucket", "mode": "MOUNT"}}
    assert "checked" in said


@pytest.mark.parametrize(("devices", "accelerators", "nodes"), KINDS)
def test_skypilot_reads_it(capsys, devices, accelerators, nodes):
    sky = pytest.importorskip("sky")
    text, said = launch(capsys, "skypilot", devices, "--env", "A=b", "--mount", "volume:/data")
    task = sky.Task.from_yaml_config(yaml.safe_load(text))
    (resources,) = task.resources
    name, _, count = accelerators.partition(":")
    assert (task.num_nodes, resources.accelerators) == (nodes, {name: int(count or 1)})
    assert task.envs["A"] == "b" and "checked by skypilot" in said
    assert "SkyPilot does not take the task" in refused(capsys, "skypilot", devices, "--infra", "nowhere")


def run(text, tmp_path, monkeypatch):
    """The words and the variables that the task's command gets on the second of two nodes."""
    program = "python3 -c 'import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))' lmx \"$@\""
    fake(tmp_path / "bin", monkeypatch, lmx=program)
    (tmp_path / "lmx-env" / "bin").mkdir(parents=True)
    (tmp_path / "lmx-env" / "bin" / "activate").write_text("export ACTIVE=yes\n")
    node = {
        "HOME": str(tmp_path),
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    script = yaml.safe_load(text)["run"]
    subprocess.run(["bash", "-n"], input=yaml.safe_load(text)["setup"], text=True, check=True)
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, env=os.environ | node, check=True)
    return json.loads(done.stdout)


def test_gpu_processes_find_each_other(capsys, tmp_path, monkeypatch):
    words, variables = run(launch(capsys, "skypilot", "h100:16", AWKWARD)[0], tmp_path, monkeypatch)
    assert words == command(AWKWARD) and variables["ACTIVE"] == "yes"
    assert environment(variables) == {"coordinator_address": "10.0.0.1:8476", "num_processes": 2, "process_id": 1}


@pytest.mark.parametrize("devices", ["h100:8", "v5e:4x4"])
def test_processes_that_are_told_otherwise_are_not_told_twice(capsys, tmp_path, monkeypatch, devices):
    words, variables = run(launch(capsys, "skypilot", devices, AWKWARD)[0], tmp_path, monkeypatch)
    assert words == command(AWKWARD) and "JAX_COORDINATOR_ADDRESS" not in variables


def test_options(capsys):
    more = ["--setup", "uv sync", "--setup", "echo done", "--env", "A=yes", "--mount", "disk:/data", "--name", "big"]
    task = yaml.safe_load(launch(capsys, "skypilot", "h100:8", *more)[0])
    assert (task["name"], task["setup"], task["envs"]) == ("big", "uv sync\necho done\n", {"A": "yes"})
    assert task["run"].startswith("lmx train ")
    assert task["volumes"] == {"/data": "disk"}
    assert "SkyPilot has no tpu7x; use gke" in refused(capsys, "skypilot", "tpu7x:2x2x2")


def test_sky_is_given_what_the_dry_run_shows(capsys, tmp_path, monkeypatch):
    fake(tmp_path / "bin", monkeypatch, sky=f'cp "${{@: -1}}" {tmp_path}/taken; echo "${{@:1:4}}"')
    shown, _ = launch(capsys, "skypilot", "h100:16", AWKWARD)
    _, said = launch(capsys, "skypilot", "h100:16", AWKWARD, "--submit")
    assert (tmp_path / "taken").read_text() == shown and "submitted: jobs launch --yes --detach-run" in said


def test_what_is_sent_must_be_what_can_be_installed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no setup.py in it" in refused(capsys, "skypilot", "h100:8")
    task, _ = launch(capsys, "skypilot", "h100:8", "--setup", "pip install lmx")
    assert "pip install lmx" in task
