"""Parameters in eight bits, for generating: each kernel has a scale for each output, each table one for each row."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lmx.kernels.int8 import Quantized
from lmx.models.transformer import Transformer

KEPT = ("router",)  # small, and a token that goes to another expert is no rounding error


def quantize_params(model: Transformer, params: PyTree) -> PyTree:
    """``params`` with kernels and tables in eight bits; norms, biases, adapters and routers stay.

    The modules that have them say which axes a scale is for, as they are called.
    """
    two = model.config.architecture == "encoder_decoder"
    names = ("encoder_tokens", "decoder_tokens") if two else ("tokens",)
    return _quantized(model, params, dict.fromkeys(names, jnp.zeros((1, 1), jnp.int32)))


@functools.partial(jax.jit, static_argnums=0)
def _quantized(model: Transformer, params: PyTree, batch: dict) -> PyTree:
    _, found = model.apply({"params": params}, batch, mutable=["quantized"])
    return _replaced(params, found["quantized"])


def _replaced(params: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """``params``, with what was found in the place of what has its name."""
    return {
        name: _replaced(child, {} if name in KEPT else found.get(name, {}))
        if isinstance(child, Mapping)
        else found.get(name, child)
        for name, child in params.items()
    }


def is_quantized(params: PyTree) -> bool:
    """Whether any of the parameters are in eight bits."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantized))
    return any(isinstance(leaf, Quantized) for leaf in leaves)
