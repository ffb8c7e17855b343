"""The families that can be opened and written, by ``model_type``."""

from collections.abc import Mapping
from typing import Any

from lmx.errors import CheckpointError, nearest
from lmx.interop.bert import Bert, DistilBert, Roberta
from lmx.interop.family import Family, Head
from lmx.interop.gpt import Gpt2, GptNeoX
from lmx.interop.llama import Llama, Mistral, Mixtral, Qwen2, Qwen3
from lmx.interop.t5 import MT5, T5, Switch

FAMILIES: tuple[Family, ...] = (
    Bert(),
    Roberta(),
    DistilBert(),
    Gpt2(),
    GptNeoX(),
    T5(),
    MT5(),
    Switch(),
    Llama(),
    Mistral(),
    Qwen2(),
    Qwen3(),
    Mixtral(),
)


def family_of(model_type: str) -> Family:
    """The family of a ``config.json``; a CheckpointError for one that there is not."""
    known = {name: family for family in FAMILIES for name in family.model_types}
    if model_type not in known:
        raise CheckpointError(f"model_type {model_type!r} of config.json is not supported{nearest(model_type, known)}")
    return known[model_type]


def head_of(family: Family, config: Mapping[str, Any]) -> tuple[str, Head]:
    """The architecture that a ``config.json`` names, the family's first one where it names none."""
    named = config.get("architectures") or [next(iter(family.architectures))]
    name = str(named[0] if isinstance(named, list) else named)
    if name not in family.architectures:
        raise CheckpointError(
            f"architecture {name!r} of config.json is not supported{nearest(name, family.architectures)}"
        )
    return name, family.architectures[name]
