"""SLURM: the sbatch script that submitit makes, and its submission by submitit.

The script runs ``lmx train`` itself, one task a node, so that what is submitted can be read and a job that goes on does
so by the same command.
"""

import dataclasses
import importlib.util
import re
import shlex
import signal
from pathlib import Path
from typing import Any

from lmx.errors import ConfigError, LmxError, missing_extra, nearest
from lmx.launching.job import ASKED_TO_STOP, GRACE_SECONDS, Job, Prepared
from lmx.parallel.processes import PEER_LOST
from lmx.paths import user_path

LOGS = "slurm"  # in the workdir
TIME = r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}"
# JAX's runtime aborts a process whose process 0 has gone; lmx itself sees other losses.
FAILED = (PEER_LOST, 128 + signal.SIGABRT, 128 + signal.SIGKILL)
# Failures are counted in a file: SLURM's own count has the starts after a stop in it, too.
# Only while the job runs: scancel sends SIGTERM too, and what is cancelled must not come back.
AGAIN = """status=$?
again=no
case $status in
  {stop}) again=yes ;;
  {failed}) echo "status $status" >>{failures}; [ "$(wc -l <{failures})" -le {restarts} ] && again=yes ;;
esac
if [ $again = yes ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
  echo "lmx train ended with status $status; the job is queued again, to go on from the last checkpoint"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status"""


@dataclasses.dataclass(frozen=True)
class Options:
    """What ``lmx launch slurm`` takes.

    Attributes:
      time: limit of each start, as sbatch's ``--time``; none: the partition's.
      partition: queue.
      account: to be charged.
      setup: lines of shell before the command.
      sbatch: ``NAME=VALUE`` of any other parameter of submitit's ``SlurmExecutor``.
    """

    time: str | None = None
    partition: str | None = None
    account: str | None = None
    setup: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()


def prepare(job: Job, options: Options) -> Prepared:
    """The sbatch script.

    Raises:
      ConfigError: an option is none of submitit's, or the devices are TPUs.
      LmxError: submitit is not installed.
    """
    submitit = _submitit()
    text = submitit.slurm.slurm._make_sbatch_string(
        command=shlex.join(job.command), folder=_folder(job), **parameters(job, options)
    )
    made = f"made and checked by submitit {submitit.__version__}"
    return Prepared(text + "\n", ".sbatch", f"{made}; its logs go to {_folder(job)}, which sbatch wants to be there")


def submit(job: Job, options: Options, prepared: Prepared) -> str:
    """Hands the script to sbatch; returns what it answered.

    Raises:
      LmxError: this is no machine of a SLURM cluster, or sbatch says no.
    """
    submitit = _submitit()
    try:
        executor = submitit.SlurmExecutor(_folder(job))
    except RuntimeError as error:
        raise LmxError(
            "submitting to SLURM needs its commands srun and sbatch, which are not here; nothing was submitted. Run "
            "this on a login node of the cluster, or take the script of the dry run there."
        ) from error
    executor.update_parameters(**parameters(job, options))
    _folder(job).mkdir(parents=True, exist_ok=True)
    try:
        # Not `submit`, which would run a pickled function that runs the command.
        submitted = executor._submit_command(shlex.join(job.command))
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError, OSError) as error:
        raise LmxError(f"sbatch did not take the job: {str(error).strip()}") from error
    return f"job {submitted.job_id}, logs in {submitted.paths.folder}"


def parameters(job: Job, options: Options) -> dict[str, Any]:
    """What submitit's executor is told.

    Raises:
      ConfigError: as :func:`prepare`.
    """
    devices = job.devices
    if devices.hardware.is_tpu:
        raise ConfigError(f"--devices {devices.name}: SLURM starts jobs on GPUs; for TPUs use gke or skypilot.")
    if options.time is not None and not re.fullmatch(TIME, options.time):
        raise ConfigError(f"--time {options.time!r} is neither minutes nor [DAYS-]HOURS:MINUTES:SECONDS.")
    failed = " | ".join(map(str, FAILED))
    failures = shlex.quote(str(_folder(job))) + '/"$SLURM_JOB_ID"_failures.txt'
    again = AGAIN.format(stop=ASKED_TO_STOP, failed=failed, failures=failures, restarts=job.max_restarts)
    fixed: dict[str, Any] = {
        "job_name": job.name,
        "nodes": devices.hosts,
        "ntasks_per_node": 1,
        "gpus_per_node": devices.chips_per_host,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "setup": [*(f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()), *options.setup],
        "teardown": again.splitlines(),
        # SIGTERM is what asks lmx to save and stop; submitit's own signal is for functions that it has pickled.
        "additional_parameters": {"requeue": True, "signal": f"TERM@{GRACE_SECONDS}"},
    }
    usual: dict[str, Any] = {"wckey": None}  # submitit's own may be none that the cluster knows
    if devices.chips_per_host == devices.hardware.node:
        usual |= {"exclusive": True, "mem": "0"}  # all of the machine
    more = _more(options.sbatch, fixed)
    if "cpus_per_task" in more:  # sbatch's does not hold for srun since SLURM 22.05
        fixed["srun_args"] = [f"--cpus-per-task={more['cpus_per_task']}"]
    return fixed | usual | more


def _more(settings: tuple[str, ...], fixed: dict[str, Any]) -> dict[str, Any]:
    """``NAME=VALUE`` of parameters that submitit passes on to sbatch as they are."""
    known = _submitit().SlurmExecutor._valid_parameters() - {*fixed, "num_gpus", "signal_delay_s", "stderr_to_stdout"}
    known -= {"use_srun", "srun_args", "array_parallelism", "gpus_per_task"}
    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        name = name.replace("-", "_")
        if name in fixed:
            raise ConfigError(f"--sbatch {setting!r}: lmx sets {name} from --devices and its own flags.")
        if not equals:
            raise ConfigError(f"--sbatch {setting!r} lacks a value: write {setting}=VALUE.")
        if name not in known:
            raise ConfigError(f"--sbatch {setting!r} names no parameter of sbatch{nearest(name, known)}")
        found[name] = {"true": True, "false": None}.get(value.lower(), value)
    return found


def _folder(job: Job) -> Path:
    return user_path(job.workdir) / LOGS


def _submitit() -> Any:
    if importlib.util.find_spec("submitit") is None:
        raise missing_extra("submitit", "launch", "making a job for SLURM")
    import submitit

    return submitit
