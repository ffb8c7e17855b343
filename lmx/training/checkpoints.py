"""Checkpoints of a run, by Orbax: saved in the background, restored onto any mesh.

A step's folder holds five items that can be read one without another: ``params``; ``eval_params``, only
where training averages parameters; ``optimizer`` (the step and the optimizer's state); ``data`` (the
position in the data) and ``meta`` (the step, its metrics, and those of steps that no line tells of yet), both JSON.
Beside them lies a manifest (:mod:`lmx.training.manifest`), by which every file is verified before it is read.
"""

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from lmx.errors import CheckpointError
from lmx.parallel.processes import barrier, gather
from lmx.paths import user_path
from lmx.training.manifest import damaged_files, has_manifest, write_manifest
from lmx.training.optimizers import eval_params
from lmx.training.state import TrainState

SELECTED_BY = "eval/loss"
ARRAYS = ("params", "eval_params", "optimizer")


class DamagedCheckpointError(CheckpointError):
    """Files of a checkpoint are missing, or have other content than was saved; ``what`` says which, without remedy."""

    def __init__(self, what: str, remedy: str):
        super().__init__(f"{what}; {remedy}.")
        self.what = what


class Checkpoints:
    """The checkpoints under ``workdir/checkpoints``: the newest ``keep`` and the best by ``eval/loss``.

    Opening for writing removes what a killed process left half-saved. Use as a context manager, or call
    :meth:`close`, so that a save under way comes to its end.

    Args:
      workdir: the run's folder.
      keep: newest checkpoints kept, beside the best.
      read_only: open a run that may still be training; nothing is written or removed.

    Raises:
      CheckpointError: opened to be read, but there is no such folder.
    """

    def __init__(self, workdir: str | Path, keep: int = 2, *, read_only: bool = False):
        self.folder = user_path(workdir).resolve() / "checkpoints"
        if read_only and not self.folder.is_dir():
            raise CheckpointError(f"{workdir} holds no checkpoints/ folder: it is no workdir of `lmx train`.")
        logging.getLogger("absl").addFilter(_not_from_orbax)
        self._read_only, self._saving = read_only, None
        if not read_only and jax.process_index() == 0:
            for leftover in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                best_fn=lambda metrics: metrics[SELECTED_BY],
                best_mode="min",
                preservation_policy=_NewestAndBest(keep),
                async_options=ocp.AsyncOptions(post_finalization_callback=self._before_commit),
                read_only=read_only,
            ),
            item_handlers={name: ocp.StandardCheckpointHandler() for name in ARRAYS}
            | {name: ocp.JsonCheckpointHandler() for name in ("data", "meta")},
        )

    def save(
        self,
        step: int,
        state: TrainState,
        data_state: Mapping[str, Any],
        metrics: Mapping[str, float],
        pending: Sequence[Any] = (),
    ) -> bool:
        """Starts to save; returns once the arrays are safe to donate. False if the step is there already.

        Args:
          step: ``state.step`` as a plain number, so that nothing has to wait for the device.
          data_state: the position in the data, a dict that JSON can hold.
          metrics: the step's metrics; ``eval/loss`` among them makes the checkpoint a candidate for the best.
          pending: what the next line of metrics.jsonl needs to know of the steps before, as JSON can hold it.
        """
        self.wait()
        self._saving = step
        metrics = {name: float(value) for name, value in metrics.items()}
        trees = {"params": state.params, "optimizer": {"step": state.step, "opt_state": state.opt_state}}
        averages = eval_params(state)
        if averages is not state.params:
            trees["eval_params"] = averages
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items["data"] = ocp.args.JsonSave(dict(data_state))
        items["meta"] = ocp.args.JsonSave({"step": step, "metrics": metrics, "pending": list(pending)})
        loss = metrics.get(SELECTED_BY, math.nan)
        return self._manager.save(
            step, args=ocp.args.Composite(**items), metrics={SELECTED_BY: loss} if math.isfinite(loss) else None
        )

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the lowest ``eval/loss``, or None if none was evaluated."""
        return self._manager.best_step()

    def restore(self, abstract_state: TrainState, step: int | None = None) -> tuple[TrainState, dict, dict]:
        """Everything that was saved.

        Args:
          abstract_state: a ``TrainState`` of ``jax.ShapeDtypeStruct`` with the shardings wanted, which need not
            be those it was saved from; without a sharding an array goes to the first device.
          step: which checkpoint; none is the newest.

        Returns:
          The state, the position in the data, and ``{"step": int, "metrics": dict, "pending": list}``.

        Raises:
          CheckpointError: there is no such checkpoint, it is damaged, or an array's name or shape differs.
        """
        step = self._existing(step)
        optimizer = {"step": abstract_state.step, "opt_state": abstract_state.opt_state}
        found = self._read(step, {"params": abstract_state.params, "optimizer": optimizer}, ("data", "meta"))
        state = TrainState(found["optimizer"]["step"], found["params"], found["optimizer"]["opt_state"])
        return state, found["data"], found["meta"]

    def restore_newest(
        self, abstract_state: TrainState, tell: Callable[[str], None]
    ) -> tuple[TrainState, dict, dict] | None:
        """The newest checkpoint that is whole; None where none was ever saved.

        A damaged one is told of and put aside, under a name of its own, and the one before it is taken. Several
        processes do so together.

        Args:
          abstract_state: as for :meth:`restore`.
          tell: gets a sentence for everything that a reader should know.

        Raises:
          CheckpointError: all are damaged, or they belong to another configuration.
        """
        while self.steps():
            step, *earlier = reversed(self.steps())
            if not has_manifest(self.folder / str(step)):
                tell(f"checkpoint {step} has no manifest (an older lmx saved it): it is read without being verified.")
            try:
                return self.restore(abstract_state, step)
            except DamagedCheckpointError as error:
                if not earlier:
                    raise
                aside = self._put_aside(step)
                tell(
                    f"{error.what}. It is put aside as {aside.name}; going on from step {earlier[0]:,}, the one before."
                )
        return None

    def abstract_params(self, step: int | None = None) -> PyTree:
        """Shapes and types of the saved parameters, on the first device; reads no array.

        Raises:
          CheckpointError: there is no such checkpoint, or it is damaged.
        """
        return jax.tree.map(
            lambda saved: _placed(jax.ShapeDtypeStruct(saved.shape, saved.dtype)),
            self._saved(self._existing(step), "params"),
        )

    def restore_params(self, abstract_params: PyTree | None = None, step: int | None = None) -> PyTree:
        """The parameters to evaluate with (the averaged ones, where training averages), without the rest.

        Args:
          abstract_params: ``jax.ShapeDtypeStruct`` with the shardings wanted; none restores every parameter as
            saved onto the first device.
          step: which checkpoint; none is the newest.

        Raises:
          CheckpointError: there is no such checkpoint, it is damaged, or a parameter's name or shape differs.
        """
        step = self._existing(step)
        item = "eval_params" if (self.folder / str(step) / "eval_params").is_dir() else "params"
        wanted = self.abstract_params(step) if abstract_params is None else abstract_params
        return self._read(step, {item: wanted})[item]

    def wait(self) -> None:
        """Returns when the save under way is on disk; raises what went wrong in it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees Orbax's threads."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _existing(self, step: int | None) -> int:
        self.wait()
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.folder} holds no whole checkpoint: train first, or name another workdir.")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.folder} holds no checkpoint of step {step}; it holds steps {steps}.")
        return steps[-1] if step is None else step

    def _saved(self, step: int, item: str) -> PyTree:
        """The tree of shapes and types that an item's own files tell."""
        try:
            return self._manager.item_metadata(step)[item].tree
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(step, error) from error

    def _read(self, step: int, arrays: Mapping[str, PyTree], plain: Sequence[str] = ()) -> dict[str, Any]:
        self._verify(step, (*arrays, *plain))
        for item, wanted in arrays.items():
            self._check(step, item, wanted)
        args = {item: ocp.args.StandardRestore(jax.tree.map(_placed, wanted)) for item, wanted in arrays.items()}
        args |= {item: ocp.args.JsonRestore() for item in plain}
        try:
            return dict(self._manager.restore(step, args=ocp.args.Composite(**args)).items())
        except (OSError, ValueError, KeyError) as error:
            raise self._damaged(step, error) from error

    def _verify(self, step: int, items: Sequence[str]) -> None:
        """Raises where files of these items are not what was saved; the processes of a run share the work."""
        folder = self.folder / str(step)
        if not has_manifest(folder):
            return
        share = (0, 1) if self._read_only else (jax.process_index(), jax.process_count())
        damaged = damaged_files(folder, items, *share)
        if damaged if self._read_only else gather([len(damaged)]).any():
            raise self._damaged(step, OSError(f"not as saved: {', '.join(damaged[:3]) or 'what another process read'}"))

    def _put_aside(self, step: int) -> Path:
        """Renames a checkpoint so that it is none any more; it is kept, for who wants to look."""
        aside = self.folder / f"{step}.damaged"
        barrier(f"reading {step}")
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)
        barrier(f"put aside {step}")
        self._manager.reload()
        return aside

    def _before_commit(self) -> None:
        """Orbax calls it in the thread that saves, when every process has written its part."""
        if jax.process_index() == 0:
            (folder,) = self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
            write_manifest(folder)

    def _check(self, step: int, item: str, wanted: PyTree) -> None:
        """Compares names and shapes before Orbax does, which would pad, cut or complain at length."""
        expected, found = _shapes(wanted), _shapes(self._saved(step, item))
        wrong = [
            f"{name} is {found.get(name, 'missing')} in the checkpoint and {expected.get(name, 'unknown')} in the model"
            for name in sorted(expected.keys() | found.keys())
            if expected.get(name) != found.get(name)
        ]
        if wrong:
            more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} belongs to another configuration: in {item}, "
                f"{'; '.join(wrong[:3])}{more}. Use the run's own config.json, or another workdir."
            )

    def _damaged(self, step: int, error: Exception) -> DamagedCheckpointError:
        reason = (str(error).splitlines() or [""])[0][:200]
        earlier = [other for other in self.steps() if other < step]
        remedy = f"delete it to go on from step {earlier[-1]}" if earlier else "there is no earlier one; train again"
        what = f"checkpoint {step} in {self.folder} is damaged ({type(error).__name__}: {reason})"
        return DamagedCheckpointError(what, remedy)


class _NewestAndBest:
    """Orbax's ``PreservationPolicy``: the newest ``keep`` checkpoints, and the best."""

    def __init__(self, keep: int):
        self.keep = keep

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        evaluated = [info for info in checkpoints if info.metrics]
        best = min(evaluated, key=lambda info: info.metrics[SELECTED_BY]).step if evaluated else None
        newest = {info.step for info in checkpoints[-self.keep :]}
        return [info.step in newest or info.step == best for info in checkpoints]


def _placed(array: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(array, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """Shapes by path. Orbax gives back tuples as lists and named tuples as dicts, so only the names count."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """Orbax tells every step of a save through absl, on the terminal; its errors are raised anyhow."""
    return record.levelno >= logging.ERROR or "orbax" not in record.pathname
