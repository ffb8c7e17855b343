"""Low-rank adapters alone, in the form of the ``peft`` library: a small folder beside its base checkpoint.

There a module is one tensor of the base, so queries, keys and values that are one tensor (GPT-2) have one adapter
together. Written, ours stand beside each other in it; read, each of ours has all of its ``A`` and its own part of
``B``. Both are exact, but for the rounding of ``B`` where modules of one folder differ in scale.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmx.errors import CheckpointError
from lmx.interop.family import Family
from lmx.interop.files import Safetensors, Tensors, TorchTensors
from lmx.interop.layouts import Weight, adapter_weights, parse
from lmx.interop.pretrained import canonical
from lmx.interop.writing import is_bare, unrolled, written_as
from lmx.model_config import Lora, Model
from lmx.models.lora import ADAPTERS, has_adapter

CONFIG, TASK = "adapter_config.json", "task.json"
FILES = {"adapter_model.safetensors": Safetensors, "adapter_model.bin": TorchTensors}
PREFIX = "base_model.model."
TASKS = {
    "classification": "SEQ_CLS",
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "span_corruption": "SEQ_2_SEQ_LM",
}
# Settings that change what an adapter or its base computes, and the values of them that are known here.
SUPPORTED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the base
} | dict.fromkeys(("use_dora", "use_qalora", "use_bdlora"), (False, None))
SUPPORTED |= dict.fromkeys(
    ("layer_replication", "alora_invocation_tokens", "arrow_config", "target_parameters"), (None,)
)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds adapters alone."""
    return (folder / CONFIG).is_file()


def save_adapters(
    folder: Path,
    model: Model,
    params: Any,
    base: str,
    tensors_of_base: Tensors,
    objective: str,
    task: str,
    labels: Sequence[str] = (),
) -> None:
    """Writes the adapters, and the heads that were trained or are not as the base has them.

    Args:
      folder: an existing folder.
      base: folder or hub name of the published checkpoint that the adapters belong to.
      tensors_of_base: its tensors.
      objective, task: as :class:`lmx.config.Objective` names them.
      labels: names of the classes.

    Raises:
      CheckpointError: there are no adapters, one has no place there, or no published family has this model.
    """
    from safetensors.numpy import save_file

    if not model.lora.rank:
        raise CheckpointError("the model has no adapters (model.lora.rank is 0); save it whole, with format='hf'.")
    family, name, _ = written_as(dataclasses.replace(model, lora=Lora()))
    leaves = unrolled(params)
    weights = [weight for weight in family.weights(model) if weight.ours in leaves]
    modules, heads = _split(model, weights, leaves)
    heads = _own_heads(family, model, heads, tensors_of_base)
    tensors = {f"{PREFIX}{theirs}": array for theirs, array in heads.items()}
    for module, pairs in modules.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.concatenate([down for down, _ in pairs], axis=0)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.concatenate([up for _, up in pairs], axis=1)
    if is_bare(family, name):
        tensors = {key.replace(f"{PREFIX}{family.prefix}", PREFIX): array for key, array in tensors.items()}
        modules = {key.removeprefix(family.prefix): pairs for key, pairs in modules.items()}
    rank, alpha = model.lora.rank, model.lora.alpha
    several = {module: len(pairs) for module, pairs in modules.items() if len(pairs) > 1}
    described = {
        "peft_type": "LORA",
        "task_type": TASKS.get(objective),
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: rank * count for module, count in several.items()},
        "alpha_pattern": {module: alpha * count for module, count in several.items()},
        "target_modules": sorted(modules),
        "modules_to_save": sorted({_module(theirs, family.prefix) for theirs in heads}) or None,
        "fan_in_fan_out": any(_inputs_first(weight) for weight in weights if weight.ours.endswith("query/kernel")),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / TASK).write_text(json.dumps({"task": task, "labels": list(labels)}) + "\n")
    (folder / CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


def _split(
    model: Model, weights: Sequence[Weight], leaves: Mapping[str, Any]
) -> tuple[dict[str, list[list[np.ndarray]]], dict[str, dict[str, np.ndarray]]]:
    """The adapters, pairs of ``A`` and ``B`` by module, and the tensors of each head."""
    modules, heads, written = {}, {}, set()
    for weight in weights:
        if weight.ours.startswith("heads/"):
            weight.write(np.asarray(leaves[weight.ours]), heads.setdefault(weight.ours.split("/")[1], {}))
            written.add(weight.ours)
        elif weight.ours.endswith("/kernel") and has_adapter(model, weight.ours.split("/")[:-1]):
            pair: dict[str, np.ndarray] = {}
            for part in adapter_weights(weight):
                part.write(np.asarray(leaves[part.ours]), pair)
                written.add(part.ours)
            modules.setdefault(weight.theirs.removesuffix(".weight"), []).append(list(pair.values()))
    lost = [ours for ours in leaves if (ours.startswith("heads/") or ours.endswith(ADAPTERS)) and ours not in written]
    if lost:
        raise CheckpointError(f"peft has no place for {', '.join(lost)}; save the model whole, with format='hf'.")
    return modules, heads


def _own_heads(
    family: Family, model: Model, heads: Mapping[str, Mapping[str, np.ndarray]], base: Tensors
) -> dict[str, np.ndarray]:
    """The tensors of the heads that were trained, or are not as the base has them."""
    own = {head: its for head, its in heads.items() if head in model.lora.heads or not _as_in(family, base, its)}
    if "mlm" in own:
        raise CheckpointError("the parts of an MLM head cannot be named for peft; save the model whole: format='hf'.")
    return {name: array for its in own.values() for name, array in its.items()}


def _as_in(family: Family, base: Tensors, head: Mapping[str, np.ndarray]) -> bool:
    """Whether the base has these very tensors."""
    named = canonical(family, base.shapes)

    def same(name: str, array: np.ndarray) -> bool:
        theirs = named.get(name)
        if theirs is None or base.shapes[theirs] != array.shape:
            return False
        return np.array_equal(base.read(theirs, tuple(slice(0, size) for size in array.shape)), array)

    return all(same(name, array) for name, array in head.items())


@dataclasses.dataclass(frozen=True)
class Adapters:
    """A folder of adapters, read.

    Attributes:
      folder: where they are.
      base: folder or hub name of the checkpoint that they belong to.
      tensors: the adapters and the heads beside them, by their names in the base.
      scales: what the product of an adapter is multiplied by, by its module.
      task: classification or regression.
      labels: names of the classes, if they are known.
    """

    folder: Path
    base: str
    tensors: dict[str, np.ndarray]
    scales: dict[str, float]
    task: str
    labels: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path) -> "Adapters":
        """Reads a folder.

        Raises:
          CheckpointError: it is damaged, or has what cannot be represented.
        """
        config = _object(folder / CONFIG, "base_model_name_or_path", "r", "lora_alpha")
        task = _object(folder / TASK, "task", "labels") if (folder / TASK).is_file() else {"task": "", "labels": ()}
        base = config["base_model_name_or_path"]
        if not base:
            raise CheckpointError(f"{folder / CONFIG} names no base; set its base_model_name_or_path.")
        for key, values in SUPPORTED.items():
            if config.get(key, values[0]) not in values:
                known = ", ".join(map(repr, values))
                raise CheckpointError(f"{key}={config[key]!r} of {folder / CONFIG} is not supported; known: {known}.")
        name = next((name for name in FILES if (folder / name).is_file()), None)
        if name is None:
            raise CheckpointError(f"{folder} has no adapters: neither {' nor '.join(FILES)} is there.")
        tensors = _read_all(FILES[name]([folder / name]), folder / name)
        modules = {key.partition(".lora_")[0] for key in tensors if ".lora_" in key}
        for module in sorted(modules):
            lacking = [f"{module}.lora_{part}.weight" for part in "AB" if f"{module}.lora_{part}.weight" not in tensors]
            others = [
                key for key in tensors if key.startswith(f"{module}.lora_") and key[-8:] not in ("A.weight", "B.weight")
            ]
            if lacking or others:
                what = f"has {others[0]}, of a kind that is not supported" if others else f"lacks {lacking[0]}"
                raise CheckpointError(f"{folder / name} {what}.")
        scales = {module: _scale(config, module, len(tensors[f"{module}.lora_A.weight"])) for module in modules}
        return cls(folder, base, tensors, scales, task["task"], tuple(task["labels"]))

    def named_as(self, family: Family) -> "Adapters":
        """The same with the names that the family's table has."""
        names, end = canonical(family, self.tensors), ".lora_A.weight"
        tensors = {ours: self.tensors[name] for ours, name in names.items()}
        scales = {o.removesuffix(end): self.scales[n.removesuffix(end)] for o, n in names.items() if n.endswith(end)}
        return dataclasses.replace(self, tensors=tensors, scales=scales)

    def num_classes(self, family: Family) -> int | None:
        """Outputs of the classification head among the tensors, if there is one."""
        rows = family.weights(Model(num_layers=1, heads=("classification",)))
        name = next((row.theirs for row in rows if row.ours == "heads/classification/output/kernel"), None)
        return len(self.tensors[name]) if name in self.tensors else None

    def onto(self, family: Family, model: Model, base: Tensors) -> tuple[Model, Tensors]:
        """The model with these adapters, and the base's tensors with theirs.

        All adapters of ours have one rank and one scale: a smaller one gets rows of zeros, and ``B`` the difference in
        scale. A module without an adapter, where its like in other layers have one, gets zeros.

        Raises:
          CheckpointError: a tensor has no place in the model.
        """
        kernels = [w for w in family.weights(model) if w.ours.endswith("/kernel") and len(w.ours.split("/")) > 3]
        found = {w.ours: w for w in kernels if w.theirs.removesuffix(".weight") in self.scales}
        unknown = set(self.scales) - {w.theirs.removesuffix(".weight") for w in found.values()}
        if unknown or not self.scales:
            what = ", ".join(sorted(unknown)[:3]) or "any module"
            raise CheckpointError(f"{self.folder}: the base {self.base} has no place for an adapter of {what}.")
        rank = max(len(self.tensors[f"{module}.lora_A.weight"]) for module in self.scales)
        scale = max(self.scales.values())
        targets = sorted({"/".join(ours.split("/")[-3:-1]) for ours in found})
        whole = {
            w.ours.split("/")[1] for w in family.weights(model) if w.ours[:6] == "heads/" and w.theirs in self.tensors
        }
        heads = tuple(dict.fromkeys([*Lora().heads, *sorted(whole)]))
        lora = Lora(rank=rank, alpha=scale * rank, targets=tuple(targets), heads=heads)
        model = dataclasses.replace(model, lora=lora)
        named = canonical(family, base.shapes)
        shapes = {name: base.shapes[theirs] for name, theirs in named.items()}
        arrays = {name: array for name, array in self.tensors.items() if ".lora_" not in name}
        for weight in kernels:
            if has_adapter(model, weight.ours.split("/")[:-1]):
                arrays |= self._of_one_rank(shapes, weight, rank, scale)
        return model, _Over(base, named, arrays, self.folder)

    def _of_one_rank(
        self, shapes: Mapping[str, tuple[int, ...]], weight: Weight, rank: int, scale: float
    ) -> dict[str, np.ndarray]:
        module = weight.theirs.removesuffix(".weight")
        down, up = (f"{module}.lora_{name}.weight" for name in "AB")
        if module not in self.scales:
            shape = shapes[weight.theirs]
            outputs, inputs = shape[::-1] if _inputs_first(weight) else shape
            return {down: np.zeros((rank, inputs), np.float32), up: np.zeros((outputs, rank), np.float32)}
        a, b = self.tensors[down], self.tensors[up]
        more = rank - len(a)
        return {
            down: np.pad(a, ((0, more), (0, 0))),
            up: np.pad(b * np.asarray(self.scales[module] / scale, b.dtype), ((0, 0), (0, more))),
        }


class _Over(Tensors):
    """Tensors in memory over those of a checkpoint, all by the names of the family's table."""

    def __init__(self, base: Tensors, named: Mapping[str, str], arrays: Mapping[str, np.ndarray], folder: Path):
        self._base, self._named, self._arrays = base, named, arrays
        self.shapes = {name: base.shapes[theirs] for name, theirs in named.items()}
        self.shapes |= {name: array.shape for name, array in arrays.items()}
        self.files = {name: base.files[theirs] for name, theirs in named.items()} | dict.fromkeys(arrays, folder)

    def dtype(self, name):
        return self._arrays[name].dtype if name in self._arrays else self._base.dtype(self._named[name])

    def read(self, name, index):
        return self._arrays[name][index] if name in self._arrays else self._base.read(self._named[name], index)


def _object(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object with these keys."""
    try:
        found = json.loads(path.read_text())
        missing = [key for key in keys if key not in dict(found)]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}.")
    return found


def _read_all(file: Tensors, path: Path) -> dict[str, np.ndarray]:
    """All tensors of the file by their names in the base."""
    tensors = {}
    for key, shape in file.shapes.items():
        tensors[key.removeprefix(PREFIX)] = array = file.read(key, tuple(slice(0, size) for size in shape))
        if np.isnan(array).any():
            raise CheckpointError(f"tensor {key} of {path} holds NaN; the file is damaged.")
    return tensors


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What a module's product is multiplied by; ``alpha`` is that of the first pattern for its name, if any."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = config["lora_alpha"] if alpha is None else alpha
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _module(theirs: str, prefix: str) -> str:
    """The module of a head's tensor that peft keeps whole: its outermost, or, inside the body, its own."""
    return theirs.rpartition(".")[0] if prefix and theirs.startswith(prefix) else theirs.partition(".")[0]


def _inputs_first(weight: Weight) -> bool:
    groups, ours = parse(weight.layout)
    return ours[0] in groups[0]
