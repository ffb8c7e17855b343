"""Writing folders of published checkpoints, in the form of Hugging Face's ``transformers``."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from lmx.errors import CheckpointError
from lmx.interop.families import FAMILIES
from lmx.interop.family import Family
from lmx.interop.files import write_tensors
from lmx.interop.layouts import Weight
from lmx.model_config import Model
from lmx.models.stack import unroll_params


def save_pretrained(
    folder: Path,
    model: Model,
    params: PyTree,
    extra: Mapping[str, Any],
    architecture: str | None = None,
    progress: Callable[[str, int], None] = lambda name, size: None,
) -> None:
    """Writes ``config.json`` and safetensors that ``transformers`` opens.

    Args:
      folder: an existing folder.
      model, params: what to write.
      extra: more keys of ``config.json``: names of the classes, ids of special tokens.
      architecture: class name of ``transformers``; none is the first that has the model's heads.
      progress: called with each tensor's name and bytes as it is written.

    Raises:
      CheckpointError: no family can represent the model.
    """
    family, name, config = written_as(model, architecture)
    leaves = unrolled(params)
    weights = [weight for weight in family.weights(model) if weight.ours in leaves]
    unwritten = sorted(set(leaves) - {weight.ours for weight in weights})
    if unwritten:
        raise CheckpointError(f"{name} has no place for {', '.join(unwritten)}; save with format='lmx'.")
    kinds = {str(leaf.dtype) for leaf in leaves.values()}
    described = {"architectures": [name], "model_type": family.model_types[0], "dtype": max(kinds)} | config | extra
    tensors = _whole_tensors(family, weights, leaves, is_bare(family, name))
    write_tensors(folder, _told(tensors, progress))
    (folder / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


def written_as(model: Model, architecture: str | None = None) -> tuple[Family, str, dict[str, Any]]:
    """The family that can represent the model, the architecture and its config."""
    unlike: list[CheckpointError] = []
    for family in FAMILIES:
        names = [name for name, head in family.architectures.items() if head.heads == model.heads]
        if architecture is not None:
            names = [name for name in names if name == architecture]
        if not names:
            continue
        try:
            return family, names[0], family.config(model)
        except CheckpointError as error:  # Unlike, or a setting without a name among theirs
            unlike.append(error)
    nearest = min(unlike, key=lambda error: getattr(error, "count", 1000), default="none has these heads")
    raise CheckpointError(
        f"no family of published checkpoints has this model ({model.architecture}, heads "
        f"{', '.join(model.heads) or 'none'}): {nearest}. Save with format='lmx'."
    )


def is_bare(family: Family, architecture: str) -> bool:
    """Whether the names of a body have no prefix in this architecture, because it has nothing beside the body."""
    return family.architectures[architecture].heads in ((), ("pooler",))


def _told(
    tensors: Iterator[tuple[str, np.ndarray]], progress: Callable[[str, int], None]
) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in tensors:
        yield name, array
        progress(name, array.nbytes)


def _whole_tensors(
    family: Family, weights: list[Weight], leaves: Mapping[str, Any], bare: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors one after the other; a tensor of several parameters once all of them are in it."""
    waiting: dict[str, int] = {}
    for weight in weights:
        for name, _ in weight.tensors(leaves[weight.ours].shape):
            waiting[name] = waiting.get(name, 0) + 1
    tensors: dict[str, np.ndarray] = {}
    for weight in weights:
        array = np.asarray(leaves[weight.ours])
        weight.write(array, tensors)
        for name, _ in weight.tensors(array.shape):
            waiting[name] -= 1
            if not waiting[name]:
                yield name.removeprefix(family.prefix) if bare else name, tensors.pop(name)


def unrolled(params: PyTree) -> dict[str, Any]:
    """Parameters by their names with layers unrolled, as the tables have them."""
    leaves = jax.tree_util.tree_leaves_with_path(unroll_params(params))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
