"""Writing a language model to a folder, in each of the formats that :func:`lmx.load` opens."""

import os
import shutil
import typing
from collections.abc import Callable
from pathlib import Path

import jax

from lmx.errors import LmxError, nearest
from lmx.interop.adapters import save_adapters
from lmx.interop.opening import config_extras, locate
from lmx.interop.pretrained import is_pretrained, open_checkpoint
from lmx.interop.writing import save_pretrained
from lmx.models.heads import num_params
from lmx.paths import new_folder, user_path
from lmx.training.exported import write_params
from lmx.training.workdir import write_config

if typing.TYPE_CHECKING:
    from lmx.language_model import LanguageModel


def save_model(model: "LanguageModel", path: Path, format: str, progress: Callable[[str, int], None]) -> None:
    """See :meth:`lmx.language_model.LanguageModel.save`."""
    writers = {"lmx": _save_whole, "hf": _save_published, "peft": _save_adapters}
    if format not in writers:
        raise LmxError(f"format {format!r} is unknown{nearest(format, writers)}")
    target = new_folder(path)
    beside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    beside.mkdir(parents=True)
    try:
        writers[format](model, beside, progress)
        os.replace(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _save_whole(model: "LanguageModel", folder: Path, progress: Callable[[str, int], None]) -> None:
    write_config(folder, model.config, model.config, num_params(model.params))
    model.tokenizer.save(folder / "tokenizer")
    write_params(folder / "params", model.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        progress(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.nbytes)


def _save_published(model: "LanguageModel", folder: Path, progress: Callable[[str, int], None]) -> None:
    merged = model.merged()
    extras = config_extras(merged.config, merged.tokenizer)
    save_pretrained(folder, merged.config.model, merged.params, extras, progress=progress)
    merged.tokenizer.publish(folder)


def _save_adapters(model: "LanguageModel", folder: Path, progress: Callable[[str, int], None]) -> None:
    base = model.config.train.init_from
    place = locate(base) if base else None
    if place is None or not is_pretrained(place):
        raise LmxError(
            f"adapters alone belong to a published checkpoint, and this model was not fine-tuned from one "
            f"(train.init_from={base!r}); save it whole, with format='lmx' or 'hf'."
        )
    local = user_path(base).exists()
    objective, base = model.config.objective, str(place) if local else base
    _, theirs = open_checkpoint(place)
    save_adapters(folder, model.config.model, model.params, base, theirs, objective.name, objective.task, model.labels)
