"""One run as several processes: found in the environment or told, each with its part of the data, stopped together."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lmx.errors import ConfigError, LmxError
from lmx.parallel.mesh import BATCH_AXES, batch_shards

START_SECONDS = 300  # that processes wait for each other at the start
PEER_LOST = 75  # exit status, "temporary failure" of sysexits.h: the same command goes on from the last checkpoint


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes of the run, if there are any; to be called before JAX is used.

    Without arguments they are looked for in the environment: ``JAX_COORDINATOR_ADDRESS`` with ``JAX_NUM_PROCESSES``
    and ``JAX_PROCESS_ID``, SLURM (a step of several tasks), Open MPI, and TPU pods on Cloud TPU or GKE.

    Args:
      coordinator: ``HOST:PORT`` of process 0.
      num_processes: processes in all.
      process_id: this one, from 0.

    Raises:
      ConfigError: some of the three are given and others not, or they are out of range.
      LmxError: the processes cannot be brought together. Where the others do not come within five minutes, the process
        ends with a message and status :data:`PEER_LOST`: the runtime cannot be told to stop waiting.
    """
    given = {"coordinator": coordinator, "num-processes": num_processes, "process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) < len(given):
        if missing:
            raise ConfigError(
                f"several processes need all of --coordinator HOST:PORT, --num-processes and --process-id; missing: "
                f"{', '.join(missing)}."
            )
        _check_told(coordinator, num_processes, process_id)
        _initialize(coordinator_address=coordinator, num_processes=num_processes, process_id=process_id)
    elif found := environment(os.environ):
        _initialize(**found)


def environment(variables: Mapping[str, str]) -> dict | None:
    """What ``jax.distributed.initialize`` is to be told in an environment of several processes; None in one of one.

    JAX finds out by itself who the coordinator is. But it gives each process a single GPU, even where SLURM or Open
    MPI started one process a node: an empty list of device ids leaves all of them visible.
    """
    if "JAX_COORDINATOR_ADDRESS" in variables:
        names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        missing = [name for name in names if not variables.get(name, "").isdecimal()]
        if missing:
            raise ConfigError(f"JAX_COORDINATOR_ADDRESS is set, but {' and '.join(missing)} is not a number; set it.")
        num_processes, process_id = (int(variables[name]) for name in names)
        coordinator = variables["JAX_COORDINATOR_ADDRESS"]
        _check_told(coordinator, num_processes, process_id)
        return {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    if "SLURM_LOCALID" in variables and int(variables.get("SLURM_NTASKS", 1)) > 1:
        # "4(x2),3": tasks of each node. With several, either SLURM has bound the GPUs or each task takes its own.
        alone = variables.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1"
        bound = any(name in variables for name in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"))
        return {"local_device_ids": []} if alone or bound else {}
    if int(variables.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return {"local_device_ids": []} if variables.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1" else {}
    on_tpu = variables.get("JAX_PLATFORMS", "tpu") in ("", "tpu") and "TPU_SKIP_MDS_QUERY" not in variables
    hosts = [host for host in variables.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if on_tpu and (len(hosts) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in variables or _on_a_tpu_machine()):
        return {}
    return None


def host_share(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """Which part of every batch this process loads: part ``index`` of ``count`` equal ones.

    Processes that differ only in axes that do not split the batch load the same part. The parts are in the order of
    the rows that a process's devices hold, which on a torus need not be neighbours: which rows are which is a matter
    of order alone.

    Raises:
      ConfigError: the rows of two processes overlap in part.
    """
    order = [mesh.axis_names.index(axis) for axis in BATCH_AXES]
    rest = [place for place in range(mesh.devices.ndim) if place not in order]
    by_row = mesh.devices.transpose(*order, *rest).reshape(batch_shards(mesh), -1)
    rows: dict[int, set[int]] = {}
    for row, devices in enumerate(by_row):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(part)) for part in rows.values()})
    if sum(map(len, parts)) != len(by_row) or len({len(part) for part in parts}) > 1:
        raise ConfigError(
            "the rows that two processes hold overlap in part; let mesh data x fsdp x expert be a multiple or a "
            f"divisor of the number of processes ({len(rows)})."
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def barrier(name: str) -> None:
    """Waits for all processes to come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def gather(values: Sequence[int]) -> np.ndarray:
    """The integers that every process has, [processes, values]; all must ask at the same step."""
    if jax.process_count() == 1:
        return np.asarray([values])
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(np.asarray(values, np.int32))


def first_alone(action: Callable[[], Any]) -> Any:
    """Does something in the first process while the others wait; what goes wrong there ends all of them.

    Returns:
      In the first process what ``action`` returns, elsewhere None.
    """
    result = problem = None
    if is_first():
        try:
            result = action()
        except Exception as error:
            problem = error
    if gather([problem is not None]).any():
        raise problem or LmxError("the first process of this run cannot go on; its own message says why.")
    return result


def is_first() -> bool:
    """Whether this process is the one that writes logs and prints."""
    return jax.process_index() == 0


@contextlib.contextmanager
def ends_with_peers(workdir: str | os.PathLike) -> Iterator[None]:
    """Ends this process, with a message and status :data:`PEER_LOST`, when another one of the run has gone.

    Mostly a collective breaks at once. Where this process waits for something else (a checkpoint that all of them
    write), or the coordinator is gone, JAX's runtime aborts it instead.
    """

    def end(reason: str) -> None:
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} lost another one of this run ({reason}). "
            f"Checkpoints are in {workdir}; start all processes again with the same command to go on from the newest.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(PEER_LOST)  # an orderly end would wait for the process that is gone

    if jax.process_count() > 1:
        _call_when_aborted(lambda: end("or was aborted for what stands above"))
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not _is_lost_peer(error):
            raise
        end(str(error).splitlines()[0][:200])


def _call_when_aborted(action: Callable[[], Any]) -> None:
    """Calls ``action`` in the thread that aborts this process, before it ends.

    The runtime aborts from a thread of its own. A handler of Python's module ``signal`` would have to wait for the main
    thread, which comes too late; one of C's runs where ``abort`` is called.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(number: int) -> None:
        action()

    _KEPT.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


_KEPT: list[Any] = []  # handlers, which C does not keep


def _is_lost_peer(error: Exception) -> bool:
    """Whether it is what JAX's runtime raises for a peer, and not, say, for memory."""
    words = ("gloo", "connection", "socket", "heartbeat", "coordination", "barrier", "unavailable", "deadline", "nccl")
    return jax.process_count() > 1 and any(word in str(error).lower() for word in words)


def _check_told(coordinator: str, num_processes: int, process_id: int) -> None:
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(f"the coordinator is HOST:PORT of process 0, with a port up to 65535, not {coordinator!r}.")
    if not 0 <= process_id < num_processes:
        raise ConfigError(f"process id {process_id} is not one of {num_processes} processes, which count from 0.")


def _initialize(**arguments) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    told = {name: value for name, value in arguments.items() if name != "local_device_ids"}
    where = ", ".join(f"{name} {value}" for name, value in told.items()) or "found in the environment"

    def message(reason: str) -> str:
        return (
            f"the processes of this run did not find each other ({where}): {reason}. Are all of them running, and can "
            "they reach process 0's port?"
        )

    def give_up() -> None:  # JAX would abort the process a little later, with a trace of its C++ stack
        print(f"error: {message(f'nobody came within {START_SECONDS} seconds')}", file=sys.stderr, flush=True)
        os._exit(PEER_LOST)

    print(f"waiting for the other processes ({where}), {START_SECONDS} seconds at most", file=sys.stderr, flush=True)
    patience = threading.Timer(START_SECONDS, give_up)
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(initialization_timeout=START_SECONDS + 60, **arguments)
    except (RuntimeError, ValueError) as error:
        raise LmxError(message(str(error).splitlines()[0])) from error
    finally:
        patience.cancel()


def _on_a_tpu_machine() -> bool:
    return any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio/0"))
