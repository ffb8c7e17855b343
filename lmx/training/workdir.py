"""The working directory: its fixed names, and the promise that it holds one experiment."""

import contextlib
import errno
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax

from lmx.config import Config, from_dict, to_dict
from lmx.errors import CheckpointError, DataError, LmxError
from lmx.schema import differences
from lmx.text.fingerprints import Fingerprint, changes, fingerprints

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
    "train.on_nan",
    "train.max_skipped",
    "train.stalled_after",
    "train.strategy",
    "train.max_rows_per_device",
    "data.num_workers",
    "data.on_change",
    "model.attention",
    "model.remat",
    "optimizer.offload",
    "mesh.",
    "eval.",
    "expect.",
)

# What the system says where no more can be written: ENOSPC, EDQUOT, EFBIG.
FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def write_text(path: Path, text: str) -> None:
    """Writes beside, then renames: the file is never there in part."""
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def read_config(workdir: str | os.PathLike) -> Config:
    """The resolved config of a workdir.

    Raises:
      CheckpointError: there is none, or it cannot be read.
    """
    return from_dict(_read(workdir)["config"])


def write_config(
    workdir: str | os.PathLike,
    config: Config,
    asked: Config,
    num_parameters: int,
    data_files: Mapping[str, Fingerprint] | None = None,
) -> None:
    """Writes ``config.json``: the config with all sizes resolved, as it was asked for, versions, the device, and the
    fingerprints of the data files."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    contents = {
        "config": to_dict(config),
        "asked": to_dict(asked),
        "num_parameters": num_parameters,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
    }
    if data_files is not None:
        contents["data_files"] = data_files
    Path(workdir).mkdir(parents=True, exist_ok=True)
    write_text(Path(workdir) / "config.json", json.dumps(contents, indent=2) + "\n")


def checked_data_files(
    workdir: str | os.PathLike, files: Iterable[Path], on_change: str, tell: Callable[[str], None]
) -> dict[str, Fingerprint] | None:
    """The fingerprints of the data files, for ``config.json``; compared with those there, if the run has begun.

    Args:
      files: all that the run reads.
      on_change: ``data.on_change`` of the config.
      tell: gets a sentence about a change that is let pass.

    Raises:
      DataError: files have changed, and ``on_change`` is "stop"; or one cannot be read.
    """
    before = _read(workdir)["data_files"] if (Path(workdir) / "config.json").is_file() else None
    if on_change == "unchecked":
        return before
    now = fingerprints(files, before or {})
    changed = changes(before, now) if before is not None else []
    if changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        message = f"the data has changed since the run in {workdir} began: {'; '.join(changed[:3])}{more}."
        if on_change == "stop":
            raise DataError(
                f"{message} The curve would be that of neither. Put the files back, train into another --workdir, or "
                "go on regardless with --config.data.on_change=warn."
            )
        tell(message)
    return now


@contextlib.contextmanager
def explains_full_disk(workdir: str | os.PathLike) -> Iterator[None]:
    """Turns the many errors of a disk without room into one for the reader."""
    try:
        yield
    except LmxError:
        raise
    except (OSError, ValueError) as error:  # the latter is Orbax's
        reason = next((word for word in FULL if word.lower() in str(error).lower()), None)
        if reason is None:
            raise
        raise CheckpointError(
            f"{workdir} cannot take any more ({reason}). What was saved before is whole: make room, and run the same "
            "command again to go on from the newest checkpoint."
        ) from error


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
        return {name: contents[name] for name in ("config", "asked")} | {"data_files": contents.get("data_files")}
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); restore it, or train into another workdir.") from error
