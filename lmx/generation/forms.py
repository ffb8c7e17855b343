"""Parameters in other forms, for generating: in eight bits, and as decoding on a CPU reads them fastest."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lmx.allocator import available_memory
from lmx.kernels.int8 import Quantized
from lmx.models.stack import unroll_params
from lmx.models.transformer import Transformer

KEPT = ("router",)  # small, and a token that goes to another expert is no rounding error


def quantize_params(model: Transformer, params: PyTree) -> PyTree:
    """``params`` with kernels and tables in eight bits, each kernel with a scale for each output, each table with one
    for each row; norms, biases, adapters and routers stay.

    The modules that have them say which axes a scale is for, as they are called.
    """
    return _quantized(model, params)


def is_quantized(params: PyTree) -> bool:
    """Whether any of the parameters are in eight bits."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantized))
    return any(isinstance(leaf, Quantized) for leaf in leaves)


def for_decoding(model: Transformer, params: PyTree) -> tuple[Transformer, PyTree]:
    """The same model in the form that a CPU generates with fastest, as a second copy of most parameters.

    Layers stand apart, since a loop over stacked ones copies each layer's parameters for every token, and kernels are
    :class:`lmx.kernels.products.Turned`. What came is returned where that does not help or cannot be: on other devices
    and on several, where products are of rounded numbers, and where there is no memory for the copy.
    """
    leaves = jax.tree.leaves(params)
    memory = available_memory()
    fits = memory is None or sum(leaf.nbytes for leaf in leaves) < memory
    alone = all(len(leaf.devices()) == 1 for leaf in leaves if isinstance(leaf, jax.Array))
    if not (jax.default_backend() == "cpu" and model.config.products == "dtype" and alone and fits):
        return model, params
    apart = Transformer(dataclasses.replace(model.config, scan_layers=False))
    return apart, _turned(apart, params)


@functools.partial(jax.jit, static_argnums=0)
def _quantized(model: Transformer, params: PyTree) -> PyTree:
    return _in_form("quantized", model, params)


@functools.partial(jax.jit, static_argnums=0)
def _turned(model: Transformer, params: PyTree) -> PyTree:
    return _in_form("turned", model, unroll_params(params))


def _in_form(form: str, model: Transformer, params: PyTree) -> PyTree:
    """``params``, with what the modules offer in this form as they are called."""
    two = model.config.architecture == "encoder_decoder"
    names = ("encoder_tokens", "decoder_tokens") if two else ("tokens",)
    batch = dict.fromkeys(names, jnp.zeros((1, 1), jnp.int32))
    _, found = model.apply({"params": params}, batch, mutable=[form])
    return _replaced(params, found[form])


def _replaced(params: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """``params``, with what was found in the place of what has its name."""
    return {
        name: _replaced(child, {} if name in KEPT else found.get(name, {}))
        if isinstance(child, Mapping)
        else found.get(name, child)
        for name, child in params.items()
    }
