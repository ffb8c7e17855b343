"""The working directory: its fixed names, and the promise that it holds one experiment."""

import importlib.metadata
import json
import os
from pathlib import Path

import jax

from lmx.config import Config, from_dict, to_dict
from lmx.errors import CheckpointError
from lmx.schema import differences

# What may change when the same command goes on with a run: how long and how often, and on which devices.
CHANGEABLE = (
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.early_stop_evals",
    "train.early_stop_delta",
    "train.samples",
    "train.sample_prompt",
    "train.strategy",
    "train.max_rows_per_device",
    "data.num_workers",
    "model.remat",
    "optimizer.offload",
    "mesh.",
    "eval.",
    "expect.",
)


def write_text(path: Path, text: str) -> None:
    """Writes beside, then renames: the file is never there in part."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def read_config(workdir: str | os.PathLike) -> Config:
    """The resolved config of a workdir.

    Raises:
      CheckpointError: there is none, or it cannot be read.
    """
    return from_dict(_read(workdir)["config"])


def write_config(workdir: str | os.PathLike, config: Config, asked: Config, num_parameters: int) -> None:
    """Writes ``config.json``: the config with all sizes resolved, as it was asked for, versions and the device."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    contents = {
        "config": to_dict(config),
        "asked": to_dict(asked),
        "num_parameters": num_parameters,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
    }
    Path(workdir).mkdir(parents=True, exist_ok=True)
    write_text(Path(workdir) / "config.json", json.dumps(contents, indent=2) + "\n")


def check_same_experiment(workdir: str | os.PathLike, asked: Config) -> None:
    """Raises :class:`CheckpointError` where ``workdir`` already holds a run with another config.

    Fields that only say how long, how often or on what devices (:data:`CHANGEABLE`) may differ.
    """
    if not (Path(workdir) / "config.json").exists():
        return
    started = from_dict(_read(workdir)["asked"])  # fields that have come since have their defaults
    found = differences(to_dict(started), to_dict(asked))
    conflicts = {name: pair for name, pair in found.items() if not name.startswith(CHANGEABLE)}
    if conflicts:
        fields = "; ".join(f"{name} is {old!r} there and {new!r} here" for name, (old, new) in conflicts.items())
        raise CheckpointError(
            f"{workdir} holds a run with another config: {fields}. Use another --workdir, or the config that it was "
            "started with."
        )
    done = _newest_step(workdir)
    if done > asked.train.steps:
        raise CheckpointError(
            f"{workdir} is at step {done:,} already, beyond train.steps={asked.train.steps:,}; ask for {done:,} or "
            "more."
        )


def _newest_step(workdir: str | os.PathLike) -> int:
    """The newest checkpoint's step, by the names of the folders; 0 where there is none."""
    names = (path.name for path in (Path(workdir) / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def _read(workdir: str | os.PathLike) -> dict:
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{workdir} is not a workdir of lmx: it has no config.json. Give the --workdir of a training run."
        )
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        if "model_type" in contents:
            raise CheckpointError(
                f"{workdir} is a published checkpoint and no workdir of lmx: give the --workdir of a training run."
            )
        return {"config": contents["config"], "asked": contents["asked"]}
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); restore it, or train into another workdir.") from error
