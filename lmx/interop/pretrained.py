"""Opening and writing folders of published checkpoints, in the form of Hugging Face's ``transformers``.

Tensors are read one after the other, each host only its own parts, straight onto the devices that hold them: beside
what the devices hold, memory is needed for one tensor at a time.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import PyTree

from lmx.errors import CheckpointError, damage_is
from lmx.interop.families import family_of
from lmx.interop.family import Family, build_model
from lmx.interop.files import Tensors, open_tensors
from lmx.interop.gguf import Gguf
from lmx.interop.layouts import Weight, whole
from lmx.model_config import Model, layer_period
from lmx.models.lora import ADAPTERS
from lmx.models.transformer import Transformer, init_params
from lmx.parallel.sharding import Layout, param_shardings

OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}  # of layer norms, in checkpoints that come from TensorFlow


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the tensors.

    Attributes:
      used: how many were read.
      ignored: those that were not, and why.
      fresh: parameters that the files do not have; they are freshly initialized.
    """

    used: int
    ignored: dict[str, str]
    fresh: tuple[str, ...]


def is_pretrained(folder: Path) -> bool:
    """Whether the folder is of this form, or the path is that of a GGUF file."""
    if folder.suffix == ".gguf":
        return folder.is_file()
    try:
        return "model_type" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def open_checkpoint(path: Path) -> tuple[dict[str, Any], Tensors]:
    """The ``config.json`` and the tensors of a folder or a GGUF file.

    Raises:
      CheckpointError: something is missing or damaged.
    """
    if path.suffix == ".gguf":
        file = Gguf(path)
        return file.config, file
    return read_config(path), open_tensors(path)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``; a CheckpointError where it cannot be read."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        reason = "it is no JSON object" if type(config) is not dict else "its model_type is no text"
        if type(config) is dict and type(config.get("model_type")) is str:
            return config
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
    raise CheckpointError(f"{path} is no config.json of a published checkpoint: {reason}.")


def model_config(config: Mapping[str, Any], tensors: Tensors, heads: tuple[str, ...], num_classes: int = 2) -> Model:
    """The model that a ``config.json`` and its tensors describe, with these heads.

    Whether the output layer is tied the tensors decide where they can: it is if there is none, and is not if it
    differs from the token table. (In transformers 5 the ``config.json`` of every T5 says that it is.)

    Raises:
      CheckpointError: something in it cannot be represented.
    """
    family = family_of(config["model_type"])
    with damage_is(CheckpointError, "config.json"):
        fields = family.model(config, heads)
    named = canonical(family, tensors.shapes)
    output, table = (named.get(name) for name in family.output)
    if output is None or table is None:
        fields["tie_embeddings"] = True
    elif not _equal(tensors, output, table):
        fields["tie_embeddings"] = False
    model = build_model(fields | {"scan_layers": False, "num_classes": num_classes})
    two = model.architecture == "encoder_decoder"
    depths = [(model.num_layers, False)] + [(model.num_decoder_layers or model.num_layers, True)] * two
    even = all(layers % layer_period(model, decoder) == 0 for layers, decoder in depths)
    return dataclasses.replace(model, scan_layers=even)


def load_params(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    model: Model,
    layout: Layout | None = None,
    dtype: str | None = None,
    seed: int = 0,
    progress: Callable[[str, int], None] = lambda name, size: None,
) -> tuple[PyTree, Report]:
    """Reads the parameters of ``model`` onto the mesh.

    Args:
      folder: where they are from, for messages.
      config: its ``config.json``.
      tensors: its tensors, by :func:`lmx.interop.files.open_tensors`.
      layout: where to; none is the first device.
      dtype: cast to this type; none keeps bfloat16 and float32 and makes float16 float32.
      seed: of what is freshly initialized.
      progress: called with each parameter's name and bytes once it is there.

    Raises:
      CheckpointError: a tensor is missing, has another shape, holds a NaN, or has no place in the model.
    """
    family = family_of(config["model_type"])
    shapes, targets = _targets(family, model, layout)
    named, resized = _named(config, model, tensors, targets)
    found, fresh = _divided(folder, targets, named)
    ignored = resized | _ignored(folder, family, model, tensors, named, found)
    for target in found:
        target.check(tensors, named)
    reader = functools.partial(_read, tensors, named)
    leaves = {}
    for target in found:
        kind = jnp.dtype(dtype or _kept(tensors.dtype(named[target.tensors[0]])))
        leaves[target.name] = target.load(reader, kind)
        progress(target.name, leaves[target.name].nbytes)
    leaves |= _made(model, fresh, seed)
    params = jax.tree_util.tree_map_with_path(lambda path, _: leaves[_name(path)], shapes)
    used = len({name for target in found for name in target.tensors})
    return params, Report(used, ignored, tuple(target.name for target in fresh))


def fresh_params(folder: Path, config: Mapping[str, Any], tensors: Tensors, model: Model) -> tuple[str, ...]:
    """The parameters of ``model`` that :func:`load_params` would draw afresh; no tensor is read for it."""
    _, targets = _targets(family_of(config["model_type"]), model, None)
    named, _ = _named(config, model, tensors, targets)
    return tuple(target.name for target in _divided(folder, targets, named)[1])


def _named(
    config: Mapping[str, Any], model: Model, tensors: Tensors, targets: "list[_Target]"
) -> tuple[dict[str, str], dict[str, str]]:
    """Names in the files by those of the table, and the tensors of another number of classes, with the reason."""
    named = canonical(family_of(config["model_type"]), tensors.shapes)
    resized = _resized(config, model, tensors, named, targets)
    return {name: theirs for name, theirs in named.items() if theirs not in resized}, resized


def _divided(folder: Path, targets: "list[_Target]", named: Mapping[str, str]) -> "tuple[list[_Target], list[_Target]]":
    """What is read, and what is fresh; a CheckpointError where a part of the body would be."""
    fresh = [target for target in targets if target.missing(named) is not None]
    for target in fresh:
        if not target.name.startswith("heads/") and not target.name.endswith(ADAPTERS):
            raise CheckpointError(
                f"{folder} lacks the tensor {target.missing(named)}, which {target.name} is read from."
            )
    return [target for target in targets if target.missing(named) is None], fresh


def _targets(family: Family, model: Model, layout: Layout | None) -> tuple[PyTree, "list[_Target]"]:
    """The shapes of the parameters, and each as something to fill."""
    boxed = jax.eval_shape(lambda: init_params(Transformer(model), jax.random.key(0)))
    shapes = nn.meta.unbox(boxed)
    if layout is None:
        place = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: place, shapes)
    else:
        shardings = param_shardings(boxed, layout)
    table = {weight.ours: weight for weight in family.table(model)}
    return shapes, [
        _Target(_name(path), leaf.shape, sharding, table, model)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
        )
    ]


def _made(model: Model, targets: "list[_Target]", seed: int) -> dict[str, jax.Array]:
    """Freshly initialized parameters by name, on their devices; no others are computed."""

    def make(key):
        params = nn.meta.unbox(init_params(Transformer(model), key))
        values = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
        return {target.name: values[target.name] for target in targets}

    places = {target.name: target.sharding for target in targets}
    return jax.jit(make, out_shardings=places)(jax.random.key(seed)) if targets else {}


class _Target:
    """One parameter to fill, stacked over layers or not."""

    def __init__(
        self, name: str, shape: tuple[int, ...], sharding: Sharding, table: Mapping[str, Weight], model: Model
    ):
        self.name, self.shape, self.sharding = name, shape, sharding
        match = re.fullmatch(r"(\w+)/layers/block_(\d+)/(.*)", name)
        if match:
            stack, block, rest = match[1], int(match[2]), match[3]
            period = layer_period(model, decoder=stack == "decoder" and model.architecture == "encoder_decoder")
            self.paths = [f"{stack}/layers_{group * period + block}/{rest}" for group in range(shape[0])]
            self.inner = shape[1:]
        else:
            self.paths, self.inner = [name], shape
        self.stacked = match is not None
        self.weights = [table.get(path) for path in self.paths]
        known = [weight for weight in self.weights if weight is not None]
        self.expected = {theirs: size for weight in known for theirs, size in weight.tensors(self.inner)}
        self.tensors = list(self.expected)

    def missing(self, named: Mapping[str, str]) -> str | None:
        """The first tensor that is not there, if any."""
        if None in self.weights:
            return self.paths[self.weights.index(None)]
        return next((name for name in self.tensors if name not in named), None)

    def check(self, tensors: Tensors, named: Mapping[str, str]) -> None:
        """Raises :class:`CheckpointError` for a tensor of another shape."""
        for name, shape in self.expected.items():
            found = tensors.shapes[named[name]]
            if found != shape:
                raise CheckpointError(
                    f"tensor {named[name]} of {tensors.files[named[name]]} has shape {list(found)}, but config.json "
                    f"makes it {list(shape)}."
                )

    def load(self, read: Callable, dtype: np.dtype) -> jax.Array:
        """The parameter on its devices; layers are read one by one into their stack."""
        if not self.stacked:
            return self._one(self.weights[0], read, dtype, self.sharding)
        layer = _layer_sharding(self.sharding, len(self.inner))
        stack = jnp.zeros(self.shape, dtype, device=self.sharding)
        for group, weight in enumerate(self.weights):
            stack = _put(stack, self._one(weight, read, dtype, layer), group)
        return jax.block_until_ready(stack)

    def _one(self, weight, read, dtype, sharding):
        parts = {}  # replicas share what was read

        def part(index):
            index = whole(self.inner, index)
            key = tuple((piece.start, piece.stop) for piece in index)
            if key not in parts:
                parts[key] = weight.read(read, self.inner, index, dtype)
            return parts[key]

        return jax.block_until_ready(jax.make_array_from_callback(self.inner, sharding, part))


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack, layer, group):
    return jax.lax.dynamic_update_index_in_dim(stack, layer, group, 0)


def _layer_sharding(sharding: Sharding, rank: int) -> Sharding:
    """The sharding of one layer of a stack."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = (*sharding.spec, *[None] * (rank + 1 - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(*spec[1:]))


def canonical(family: Family, names: Iterable[str]) -> dict[str, str]:
    """The names in the files by the names of the table: with the body's prefix, in today's spelling."""
    names, prefix = list(names), family.prefix
    bare = bool(prefix) and not any(name.startswith(prefix) for name in names)
    named = {}
    for name in names:
        modern = functools.reduce(lambda n, old: n.replace(old, OLD_NAMES[old]), OLD_NAMES, name)
        heads = ("lm_head.", "score.")  # a body without prefix may still come with an output layer
        named[prefix + modern if bare and not modern.startswith(heads) else modern] = name
    return named


def _resized(config, model, tensors, named, targets) -> dict[str, str]:
    """The output layer of a classifier with another number of classes than was asked for, and why it is not read."""
    theirs = config.get("num_labels") or len(config.get("id2label") or "01")
    if theirs == model.num_classes:
        return {}
    layers = (target for target in targets if target.name.startswith("heads/classification/output/"))
    names = {named[name]: shape for layer in layers for name, shape in layer.expected.items() if name in named}
    return {
        name: f"it has {theirs} classes, and this model {model.num_classes}"
        for name, shape in names.items()
        if tensors.shapes[name] == (theirs, *shape[1:])
    }


def _ignored(folder, family, model, tensors, named, found) -> dict[str, str]:
    """The tensors that are not read and why; raises for one without a reason."""
    used = {name for target in found for name in target.tensors}
    reasons = {}
    others = {
        weight.theirs
        for head in family.architectures.values()
        for weight in family.weights(dataclasses.replace(model, heads=head.heads))
        if weight.ours.startswith("heads/")
    }
    copies = family.copies(model)
    for name in sorted(set(named) - used):
        source = copies.get(name)
        if source in named and _equal(tensors, named[name], named[source]):
            reasons[named[name]] = f"a copy of {named[source]}"
            continue
        reason = next((why for pattern, why in family.ignored.items() if re.fullmatch(pattern, name)), None)
        if reason is None and name in others:
            reason = f"part of a head that this model does not have (it has {', '.join(model.heads) or 'none'})"
        if reason is None:
            raise CheckpointError(
                f"tensor {named[name]} of {tensors.files[named[name]]} has no place in the model that "
                f"{folder / 'config.json'} describes; {family.model_types[0]} with these settings has no such tensor."
            )
        reasons[named[name]] = reason
    return reasons


def _equal(tensors: Tensors, name: str, other: str) -> bool:
    if tensors.shapes[name] != tensors.shapes[other]:
        return False
    rows, *rest = tensors.shapes[name]
    step = max(1, (1 << 22) // max(int(np.prod(rest)), 1))
    whole_rest = tuple(slice(0, size) for size in rest)
    return all(
        np.array_equal(
            tensors.read(name, (slice(start, min(start + step, rows)), *whole_rest)),
            tensors.read(other, (slice(start, min(start + step, rows)), *whole_rest)),
        )
        for start in range(0, rows, step)
    )


def _read(tensors: Tensors, named: Mapping[str, str], name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor, which must be all numbers."""
    part = tensors.read(named[name], index)
    if np.isnan(part).any():
        raise CheckpointError(f"tensor {named[name]} of {tensors.files[named[name]]} holds NaN; the file is damaged.")
    return part


def _kept(dtype: np.dtype) -> np.dtype:
    return dtype if dtype in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)) else np.dtype(np.float32)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
