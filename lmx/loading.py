"""Opening a language model from whatever :func:`lmx.load` is given."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import PyTree

from lmx.config import Config
from lmx.errors import CheckpointError, LmxError
from lmx.interop.adapters import is_adapter
from lmx.interop.opening import locate, open_published
from lmx.interop.pretrained import is_pretrained
from lmx.interop.pretrained import read_config as read_published_config
from lmx.models.transformer import Transformer, init_params
from lmx.text.published import MissingTokenizer
from lmx.text.tokenizers import Tokenizer, load_tokenizer
from lmx.training.checkpoints import Checkpoints
from lmx.training.exported import read_params
from lmx.training.workdir import read_config


def load_model(
    path: str, step: int | None, options: Mapping[str, Any], progress: Callable[[str, int], None]
) -> tuple[Config, PyTree, Tokenizer]:
    """See :func:`lmx.load`.

    Args:
      options: what is for published checkpoints alone, by name; none where it is not given.
    """
    folder = locate(path)
    if is_pretrained(folder) or is_adapter(folder):
        if step is not None:
            raise LmxError(f"{path} is a published checkpoint, which has no steps; leave step={step} out.")
        opened = open_published(folder, progress=progress, **options)
        for warning in opened.warnings:
            warnings.warn(warning, stacklevel=3)
        return opened.config, opened.params, opened.tokenizer
    if any(option is not None for option in options.values()):
        raise LmxError(f"{', '.join(options)} are for published checkpoints, and {path} is none.")
    found = {name for name in ("config.json", "checkpoints", "params", "tokenizer") if (folder / name).exists()}
    if not {"config.json", "tokenizer"} <= found or not {"checkpoints", "params"} & found:
        state = f"has {', '.join(sorted(found)) or 'none of these'}" if folder.is_dir() else "is no folder"
        state += f" ({_why_unpublished(folder)})" if found == {"config.json"} else ""
        raise CheckpointError(
            f"{path} holds no model: it should be a workdir of `lmx train` (config.json, tokenizer/ and checkpoints/), "
            "a folder that LanguageModel.save wrote (config.json, tokenizer/ and params/), a published checkpoint (a "
            f"config.json with model_type) or adapters (adapter_config.json), but {folder} {state}."
        )
    config = read_config(folder)
    layout = _layout(Transformer(config.model))
    if "checkpoints" in found:
        with Checkpoints(folder, read_only=True) as checkpoints:
            params = checkpoints.restore_params(layout, step)
    elif step is not None:
        raise CheckpointError(f"{path} is an exported model without steps; leave step={step} out.")
    else:
        params = read_params(folder / "params", layout)
    tokenizer = load_tokenizer(folder / "tokenizer")
    if isinstance(tokenizer, MissingTokenizer):
        warnings.warn(str(tokenizer.refusal()), stacklevel=3)
    return config, params, tokenizer


def _why_unpublished(folder: Path) -> str:
    try:
        read_published_config(folder)
    except CheckpointError as error:
        return str(error).removesuffix(".")
    return ""


def _layout(model: Transformer) -> PyTree:
    """Names, shapes and types of the parameters, on the first device; computes nothing."""
    params = nn.meta.unbox(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params)
