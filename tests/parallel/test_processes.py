"""What the environment says of other processes, and which part of a batch each one loads."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest

from lmx.errors import ConfigError
from lmx.parallel import processes
from lmx.parallel.mesh import AXES

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),  # a shell of salloc, not a task of srun
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, {"local_device_ids": []}),
        (SLURM | {"SLURM_NTASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, {}),
        (
            SLURM | {"SLURM_NTASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_GPUS_PER_TASK": "1"},
            {"local_device_ids": []},
        ),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, {"local_device_ids": []}),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            {"coordinator_address": "h:1", "num_processes": 2, "process_id": 1},
        ),
    ],
)
def test_what_the_environment_says(variables, expected):
    assert processes.environment(variables) == expected


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ((None, 2, 0), "missing: coordinator"),
        (("h:1", None, 0), "missing: num-processes"),
        (("h:1", 2, 2), "process id 2 is not one of 2"),
        (("h", 2, 0), "HOST:PORT"),
    ],
)
def test_what_is_told_in_part_or_wrongly(told, message):
    with pytest.raises(ConfigError, match=message):
        processes.start(*told)


def test_an_environment_without_its_numbers_is_refused():
    with pytest.raises(ConfigError, match="JAX_PROCESS_ID"):
        processes.environment({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2"})


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as the shares look at."""

    process_index: int


@dataclasses.dataclass(frozen=True)
class Devices:
    """As much of a mesh."""

    devices: np.ndarray
    axis_names: tuple = AXES

    @property
    def shape(self):
        return dict(zip(self.axis_names, self.devices.shape, strict=True))


def mesh(owners, **sizes):
    """Devices of the processes that ``owners`` names, in the order of the mesh."""
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return Devices(np.array([Device(i) for i in owners], dtype=object).reshape(shape))


@pytest.mark.parametrize(
    ("owners", "sizes", "expected"),
    [
        ([0, 0, 1, 1], {"data": 4}, [(0, 2), (1, 2)]),
        ([0, 0, 1, 1], {"data": 2, "tensor": 2}, [(0, 2), (1, 2)]),
        ([0, 0, 1, 1], {"tensor": 4}, [(0, 1), (0, 1)]),
        ([0, 0, 1, 1], {"stage": 2, "data": 2}, [(0, 1), (0, 1)]),
        ([0, 1, 2, 3], {"fsdp": 2, "tensor": 2}, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ([0, 0, 1, 1, 0, 0, 1, 1], {"fsdp": 8}, [(0, 2), (1, 2)]),  # hosts of a torus: rows that are no neighbours
        ([1, 0], {"data": 2}, [(1, 2), (0, 2)]),
    ],
)
def test_parts_of_a_batch(owners, sizes, expected, monkeypatch):
    for index, share in enumerate(expected):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        assert processes.host_share(mesh(owners, **sizes)) == share


def test_rows_that_overlap_in_part_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(ConfigError, match="overlap in part"):
        processes.host_share(mesh([0, 0, 0, 1, 1, 1], data=3, tensor=2))


def test_a_process_that_the_runtime_aborts_says_what_to_do(tmp_path):
    program = tmp_path / "aborted.py"
    program.write_text(
        "import os, threading, time, jax\n"
        "from lmx.parallel import processes\n"
        "jax.process_count, jax.process_index = lambda: 3, lambda: 1\n"
        "with processes.ends_with_peers('runs/x'):\n"
        "    threading.Timer(0.1, os.abort).start()  # as the runtime does: not in the main thread\n"
        "    time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == processes.PEER_LOST
    assert "process 1 of 3 lost another one of this run" in ended.stderr and "in runs/x;" in ended.stderr


ALONE = """
import socket, sys
from lmx.parallel import processes

processes.START_SECONDS = 2
with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
processes.start(f"127.0.0.1:{port}", 2, 0)
"""


def test_a_process_that_nobody_joins_says_so_and_ends():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120)
    assert done.returncode == processes.PEER_LOST
    assert done.stderr.startswith("waiting for the other processes (coordinator_address 127.0.0.1:")
    assert "did not find each other" in done.stderr and "within 2 seconds" in done.stderr


@pytest.mark.parametrize("coordinator", ["localhost", "localhost:", ":80", "localhost:99999", "localhost:0"])
def test_a_coordinator_is_a_host_and_a_port(coordinator):
    with pytest.raises(ConfigError, match="HOST:PORT"):
        processes.start(coordinator, 2, 0)
