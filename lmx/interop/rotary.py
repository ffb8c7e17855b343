"""Rotary settings of ``config.json``, as ``rope_theta`` and ``rope_scaling`` or, newer, as ``rope_parameters``."""

import math
from collections.abc import Mapping
from typing import Any

from lmx.interop.family import unsupported
from lmx.model_config import Model

# Their key for each of our fields, by kind.
KEYS = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_length": "original_max_position_embeddings",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_length": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
}


def rotary_fields(
    config: Mapping[str, Any], base_key: str = "rope_theta", fraction_key: str = "", default_fraction: float = 1.0
) -> dict[str, Any]:
    """Base, fraction and scaling.

    Raises:
      CheckpointError: a kind of scaling that there is not, or what is no object.
    """
    # Where both are there, transformers follows the older key alone.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise unsupported("rope_scaling", rope, ("an object with rope_type",))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" and kind not in KEYS:
        raise unsupported("rope_scaling.rope_type", kind, ("default", *KEYS))
    fraction = rope.get("partial_rotary_factor", config.get(fraction_key, default_fraction))
    fields = {
        "rotary_base": float(rope.get("rope_theta", config.get(base_key) or 10000.0)),
        "rotary_fraction": float(fraction),
    }
    if kind == "default":
        return fields
    scaling = {"kind": kind, "original_length": config.get("max_position_embeddings", 2048)}
    scaling |= {ours: rope[theirs] for ours, theirs in KEYS[kind].items() if rope.get(theirs) is not None}
    if kind == "yarn" and "attention_factor" not in scaling and rope.get("mscale") and rope.get("mscale_all_dim"):
        log = 0.1 * math.log(scaling["factor"]) if scaling["factor"] > 1 else 0.0
        scaling["attention_factor"] = (rope["mscale"] * log + 1) / (rope["mscale_all_dim"] * log + 1)
    return fields | {"rotary_scaling": scaling}


def rotary_keys(model: Model, base_key: str = "rope_theta", fraction_key: str = "") -> dict[str, Any]:
    """The inverse of :func:`rotary_fields`."""
    keys: dict[str, Any] = {base_key: model.rotary_base}
    if fraction_key:
        keys[fraction_key] = model.rotary_fraction
    scaling = model.rotary_scaling
    if scaling.kind != "none":
        named = {theirs: getattr(scaling, ours) for ours, theirs in KEYS[scaling.kind].items()}
        keys["rope_scaling"] = {"rope_type": scaling.kind} | {k: v for k, v in named.items() if v is not None}
    return keys
