"""The script is run by a real shell, with commands that stand for SLURM's."""

import json
import os
import shlex
import subprocess

import pytest

from lmx.cli import main
from lmx.parallel.processes import PEER_LOST
from tests.launching.jobs import AWKWARD, arguments, command, fake, launch, refused

CALLED = 'echo "$0 $*" >> "$CALLS"'


def settings(script):
    """The lines that sbatch reads."""
    words = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (shlex.split(word)[0].partition("=") for word in words)}


@pytest.mark.parametrize(
    ("devices", "nodes", "gpus", "whole"), [("h100:16", "2", "8", True), ("a100:4", "1", "4", False)]
)
def test_one_task_a_node_that_sees_all_of_its_gpus(capsys, devices, nodes, gpus, whole):
    script, said = launch(capsys, "slurm", devices, "--time", "1-12:00:00", "--account", "lab", "--partition", "gpu")
    found = settings(script)
    assert (found["nodes"], found["ntasks-per-node"], found["gpus-per-node"]) == (nodes, "1", gpus)
    assert ("exclusive" in found, found.get("mem")) == ((True, "0") if whole else (False, None))
    assert (found["time"], found["account"], found["partition"]) == ("1-12:00:00", "lab", "gpu")
    assert (found["job-name"], found["signal"]) == ("gpt2-tiny", "TERM@120") and "requeue" in found
    assert found["output"] == "/runs/one/slurm/%j_0_log.out"
    assert "made and checked by submitit" in said
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_without_a_time_the_limit_is_the_partitions(capsys):
    assert "time" not in settings(launch(capsys, "slurm", "h100:8")[0])


def test_other_parameters_are_those_of_submitit(capsys):
    more = [f"--sbatch={one}" for one in ("qos=high", "cpus-per-task=32", "exclusive=false", "mem=9GB")]
    script, _ = launch(capsys, "slurm", "h100:8", *more)
    found = settings(script)
    assert (found["qos"], found["cpus-per-task"], found["mem"]) == ("high", "32", "9GB") and "exclusive" not in found
    assert "--cpus-per-task=32" in shlex.split(script.split("SUBMITIT_EXECUTOR=slurm\n")[1].splitlines()[0])


@pytest.mark.parametrize(
    ("devices", "flags", "message"),
    [
        ("h100:8", ["--sbatch", "qso=high"], "did you mean 'qos'?"),
        ("h100:8", ["--sbatch", "nodes=3"], "lmx sets nodes"),
        ("h100:8", ["--time", "soon"], "--time 'soon' is neither minutes"),
        ("v5p:2x2x4", [], "for TPUs use gke or skypilot"),
    ],
)
def test_what_slurm_would_not_take(capsys, devices, flags, message):
    assert message in refused(capsys, "slurm", devices, *flags)


def run(script, tmp_path, monkeypatch, status=0, state="RUNNING"):
    """Runs the script; returns its exit status, the words after ``srun`` and the calls of ``scontrol``."""
    words = f"""python3 -c 'import json, os, sys; print(json.dumps([sys.argv[1:], os.environ.get("A")]))' "$@"
exit {status}"""
    fake(tmp_path / "bin", monkeypatch, srun=words, squeue=f"{CALLED}; echo {state}", scontrol=CALLED)
    calls = tmp_path / "calls"
    calls.write_text("")
    variables = os.environ | {"CALLS": str(calls), "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, env=variables)
    requeued = [line.partition("bin/")[2] for line in calls.read_text().splitlines() if "scontrol" in line]
    return done.returncode, json.loads(done.stdout.splitlines()[0]), requeued


def test_the_command_comes_through_the_shell_as_it_was_typed(capsys, tmp_path, monkeypatch):
    script, _ = launch(capsys, "slurm", "h100:16", AWKWARD, "--env", "A=it's b", "--setup", "A=$A!; export A")
    status, (words, variable), _ = run(script, tmp_path, monkeypatch)
    assert (status, words[words.index("lmx") :], variable) == (0, command(AWKWARD), "it's b!")


@pytest.mark.parametrize(
    ("statuses", "again"),
    [
        ([143] * 5, True),  # asked to stop, as at a time limit: always
        ([PEER_LOST, 134, 137], True),
        ([PEER_LOST, 134, 137, PEER_LOST], False),
        ([143, 143, 143, 143, PEER_LOST], True),  # being stopped is no failure
        ([2], False),  # bad input stays bad
        ([0], False),
    ],
)
def test_a_job_that_was_stopped_is_queued_again(capsys, tmp_path, monkeypatch, statuses, again):
    script, _ = launch(capsys, "slurm", "h100:16", "--max-restarts", "3", "--workdir", str(tmp_path / "it's one"))
    (tmp_path / "it's one" / "slurm").mkdir(parents=True)
    for status in statuses:
        ended, _, requeued = run(script, tmp_path, monkeypatch, status)
    assert (ended, requeued) == (statuses[-1], ["scontrol requeue 7"] if again else [])


def test_a_job_that_was_cancelled_is_not_queued_again(capsys, tmp_path, monkeypatch):
    script, _ = launch(capsys, "slurm", "h100:16")
    assert run(script, tmp_path, monkeypatch, 143, "COMPLETING")[2] == []


def test_what_is_submitted_is_what_the_dry_run_shows(capsys, tmp_path, monkeypatch):
    taken = tmp_path / "taken"
    fake(tmp_path / "bin", monkeypatch, srun="", sbatch=f'cp "$1" {taken}; echo "Submitted batch job 7"')
    workdir = ["--workdir", str(tmp_path / "run")]
    shown, _ = launch(capsys, "slurm", "h100:16", *workdir, AWKWARD)
    assert not (tmp_path / "run").exists()
    _, said = launch(capsys, "slurm", "h100:16", *workdir, AWKWARD, "--submit")
    assert taken.read_text().strip() == shown.strip() and "submitted: job 7" in said


def test_a_workdir_in_the_home_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fake(tmp_path / "bin", monkeypatch, srun="", sbatch='echo "Submitted batch job 7"')
    _, said = launch(capsys, "slurm", "h100:16", "--workdir=~/runs/one", "--submit")
    assert "submitted: job 7" in said and (tmp_path / "runs" / "one" / "slurm").is_dir()


def test_what_sbatch_says_against_a_job_is_told(capsys, tmp_path, monkeypatch):
    fake(tmp_path / "bin", monkeypatch, srun="", sbatch='echo "invalid partition specified: nowhere" >&2; exit 1')
    given = arguments("slurm", "h100:16", "--workdir", str(tmp_path / "run"), "--submit")
    assert main(given) == 2
    assert "invalid partition specified: nowhere" in " ".join(capsys.readouterr().err.split())
