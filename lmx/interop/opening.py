"""From a folder or a hub name to all that a language model holds: config, parameters and tokenizer."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from lmx.config import Config, Data, Model, Objective, Tokenizer, Train
from lmx.errors import CheckpointError, LmxError, located
from lmx.interop.adapters import CONFIG, Adapters, is_adapter
from lmx.interop.families import family_of, head_of
from lmx.interop.pretrained import Report, load_params, model_config, open_checkpoint
from lmx.interop.writing import unrolled
from lmx.models.lora import ADAPTERS
from lmx.parallel.sharding import Layout
from lmx.paths import user_path
from lmx.text.published import MissingTokenizer, NoTokenizer, PublishedTokenizer
from lmx.text.tokenizers import Tokenizer as AnyTokenizer

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")  # .bin only where there is nothing else
DTYPES = ("float32", "bfloat16")  # of parameters
LONGEST_ROW = 512  # tokens of a row, where the model has no smaller bound


@dataclasses.dataclass(frozen=True)
class Published:
    """An opened checkpoint.

    Attributes:
      config, params: the model.
      tokenizer: the folder's, or a :class:`MissingTokenizer` where it has none.
      report: what became of the tensors.
      warnings: what whoever opened it should know.
    """

    config: Config
    params: PyTree
    tokenizer: AnyTokenizer
    report: Report
    warnings: tuple[str, ...]


def open_published(
    folder: Path,
    *,
    num_classes: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None,
    progress: Callable[[str, int], None] = lambda name, size: None,
) -> Published:
    """Opens a published checkpoint, or adapters with the published checkpoint that they belong to.

    Args:
      folder: holds ``config.json``, the tensors and the tokenizer's files; or a GGUF file, which holds them all; or
        adapters in the form of ``peft``.
      num_classes: a classifier with so many classes, whatever heads the checkpoint has; none keeps them.
      mesh: the devices to load onto; none is the first.
      dtype: cast parameters to this type; none keeps bfloat16 and float32.
      progress: called with each parameter's name and bytes once it is there.

    Raises:
      LmxError: ``num_classes`` or ``dtype`` is none that there can be.
      CheckpointError: the checkpoint is damaged, or cannot be represented.
      DataError: the tokenizer's files are damaged.
    """
    _check_options(num_classes, dtype)
    adapters = Adapters.open(folder) if is_adapter(folder) else None
    if adapters:
        with located(f"base_model_name_or_path of {folder / CONFIG}"):
            folder = locate(adapters.base)
    theirs, tensors = open_checkpoint(folder)
    family = family_of(theirs["model_type"])
    if adapters:
        adapters = adapters.named_as(family)
        num_classes = adapters.num_classes(family) if num_classes is None else num_classes
    _, head = head_of(family, theirs)
    heads, objective, labels = head.heads, head.objective, _labels(theirs)
    if num_classes is not None:
        heads, objective = ("classification",), "classification"
        labels = labels if len(labels) == num_classes else _unnamed(num_classes)
    model = model_config(theirs, tensors, heads, len(labels))
    if objective == "classification" and model.architecture == "encoder_decoder":
        raise LmxError(f"num_classes={num_classes}: a classifier reads one stack, and {folder} has two.")
    if adapters:
        if len(adapters.labels) == len(labels):
            labels = adapters.labels
        model, tensors = adapters.onto(family, model, tensors)
    tokenizer, warnings = _tokenizer(folder, theirs, model)
    task = (adapters and adapters.task) or theirs.get("problem_type")
    regression = objective == "classification" and task == "regression"
    config = Config(  # whose fields must fit each other before tensors are fitted to them
        model=model,
        objective=Objective(name=objective, task="regression" if regression else "classification"),
        data=Data(length=_longest(model), labels=labels if objective == "classification" and not regression else ()),
        tokenizer=Tokenizer(kind="published", path=str(folder)),
        train=Train(init_from=adapters.base if adapters else ""),
    )
    layout = None if mesh is None else Layout(mesh)
    params, report = load_params(folder, theirs, tensors, model, layout, dtype, progress=progress)
    config = config.replace(model={"dtype": _type_of_body(params)})
    if report.fresh:
        warnings.append(f"{', '.join(report.fresh)}: not in {folder}, so freshly initialized, and means nothing yet.")
    return Published(config, params, tokenizer, report, tuple(warnings))


def _type_of_body(params: PyTree) -> str:
    """What to compute in: bfloat16 if all of the body is, whatever fresh heads and adapters are."""
    leaves = unrolled(params).items()
    body = [leaf for name, leaf in leaves if not name.startswith("heads/") and not name.endswith(ADAPTERS)]
    return "bfloat16" if {str(leaf.dtype) for leaf in body} == {"bfloat16"} else "float32"


def _tokenizer(folder: Path, theirs: Mapping[str, Any], model: Model) -> tuple[AnyTokenizer, list[str]]:
    """The tokenizer, and what is to be said about it."""
    try:
        tokenizer = PublishedTokenizer.open(folder)
    except NoTokenizer as error:
        found = MissingTokenizer.open(folder, {**theirs, "vocab_size": model.vocab_size})
        return found, [f"{error} The model reads ids, and no texts."]
    if tokenizer.vocab_size > model.vocab_size:
        return tokenizer, [
            f"the tokenizer of {folder} has {tokenizer.vocab_size:,} ids, and the model's table {model.vocab_size:,} "
            "rows: texts with any of the others are refused."
        ]
    return tokenizer, []


def _check_options(num_classes: Any, dtype: Any) -> None:
    if dtype not in (None, *DTYPES):
        raise LmxError(f"dtype={dtype!r}: parameters are {' or '.join(map(repr, DTYPES))}; none keeps what there is.")
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
        raise LmxError(f"num_classes={num_classes!r}, where a number from 1 on is due.")


def config_extras(config: Config, tokenizer: Any) -> dict[str, Any]:
    """What ``config.json`` says beside the model: names of the classes and ids of special tokens."""
    classifies, stops = config.objective.name == "classification", tokenizer.stop_ids
    ids = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "eos": list(stops) if len(stops) > 1 else tokenizer.eos_id}
    if classifies and tokenizer.pad_id is None:
        ids["pad"] = tokenizer.eos_id  # a decoder's classifier has to know where a row ends
    extras: dict[str, Any] = {f"{name}_token_id": i for name, i in ids.items() if i is not None}
    if classifies:
        if config.objective.task == "regression":
            extras |= {"problem_type": "regression", "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        else:
            names = config.data.labels or tuple(map(str, range(config.model.num_classes)))
            extras |= {"id2label": {str(i): name for i, name in enumerate(names)}}
            extras |= {"label2id": {name: i for i, name in enumerate(names)}}
    return extras


def fetch(name: str, cached: bool = False) -> Path:
    """The folder of a hub name: from the cache, or fetched where there is a network.

    Args:
      cached: from the cache alone.

    Raises:
      CheckpointError: there is no such name, or no network and it is not in the cache.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise CheckpointError(
            f"there is no folder {name!r} here; to fetch a model of that name from the hub, install 'lmx[hf]'."
        ) from None
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(HUB_FILES), local_files_only=cached))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, "*.bin"], local_files_only=cached))
    except LocalEntryNotFoundError:
        hub = "" if cached else ", and no hub to be reached"
        raise CheckpointError(
            f"there is no folder {name!r} here, no model of that name in the hub's cache{hub}."
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise CheckpointError(f"{name!r} cannot be fetched from the hub: {str(error).splitlines()[0]}") from None
    return folder


def locate(path: str, cached: bool = False) -> Path:
    """The folder that is meant: the path itself, or where there is none, the hub's of that name, by :func:`fetch`."""
    folder = user_path(path)
    if folder.exists():
        return folder.resolve()
    if not HUB_NAME.fullmatch(path):
        raise CheckpointError(f"there is no folder {str(folder)!r}, seen from {Path.cwd()}.")
    return fetch(path, cached)


def body_of(config: Config, folder: Path) -> Config:
    """``config`` with the body of a published checkpoint. Its heads and how it is computed stay its own."""
    (theirs, tensors), ours = open_checkpoint(folder), config.model
    model = model_config(theirs, tensors, ours.heads, ours.num_classes)
    kept = {
        name: getattr(ours, name)
        for name in ("attention", "products", "dtype", "remat", "head_dropout", "num_classes", "lora")
    }
    return dataclasses.replace(config, model=dataclasses.replace(model, **kept))


def _labels(config: Mapping[str, Any]) -> Sequence[str]:
    names = config.get("id2label")
    if names:
        return tuple(names[key] for key in sorted(names, key=int))
    return _unnamed(config.get("num_labels", 2))


def _unnamed(number: int) -> tuple[str, ...]:
    """Names of classes that have none, as they are called there."""
    return tuple(f"LABEL_{i}" for i in range(number))


def _longest(model: Model) -> int:
    return min(model.max_length, LONGEST_ROW) if model.position == "learned" else LONGEST_ROW
