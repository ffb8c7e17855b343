"""Low-rank adapters (Hu et al. 2021): which projections have one, and how they are merged into their kernels."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from lmx.model_config import Lora, Model

ADAPTERS = ("lora_a", "lora_b")  # names of an adapter's parameters, beside the kernel they add to


def has_adapter(config: Model, path: Sequence[str]) -> bool:
    """Whether the projection at ``path`` has an adapter: its path ends as one of ``config.lora.targets`` does."""
    return config.lora.rank > 0 and f"/{'/'.join(path)}".endswith(tuple(f"/{target}" for target in config.lora.targets))


def merge_adapters(params: PyTree, config: Model) -> tuple[PyTree, Model]:
    """Parameters without adapters that compute the same, and the config that they belong to."""
    scale = config.lora.alpha / max(config.lora.rank, 1)

    def merge(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if "lora_a" not in node:
            return {name: merge(child) for name, child in node.items()}
        kernel, down, up = node["kernel"], node["lora_a"], node["lora_b"]
        stacked = kernel.ndim + 2 - down.ndim - up.ndim  # a negative one: both have the axis of layers
        if stacked < 0:
            product = jnp.stack([jnp.tensordot(a, b, 1) for a, b in zip(down, up, strict=True)])
        else:
            product = jnp.tensordot(down, up, 1)
        kept = {name: child for name, child in node.items() if name not in ADAPTERS}
        return kept | {"kernel": (kernel + scale * product).astype(kernel.dtype)}

    return merge(params), dataclasses.replace(config, lora=Lora())
