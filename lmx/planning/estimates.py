"""What a compiler would say, by formula: for devices without a compiler here, and to rank meshes before compiling.

The counts are those of the papers that each axis comes from: ZeRO (Rajbhandari et al. 2020, section 7) for ``fsdp``,
Megatron (Korthikanti et al. 2022, section 4.2) for ``tensor``, GShard (Lepikhin et al. 2020, section 3.2) for
``expert``.
"""

import math
from collections.abc import Mapping

import jax.numpy as jnp

from lmx.config import Config
from lmx.model_config import Model
from lmx.parallel.pipeline import MICROBATCHES_A_STAGE
from lmx.planning.collectives import Collective

LAYERS = ("attention", "feed-forward", "experts")  # parts of the parameters that a scan over layers holds
FLOAT32 = 4  # bytes
GATHERED = ("fsdp", "sequence", "expert")  # axes that split a parameter which every one of their devices needs whole


def estimated_collectives(
    config: Config, parameters: Mapping[str, int], sizes: Mapping[str, int], tokens: int, microbatches: int
) -> list[Collective]:
    """What the devices of a mesh have to send in a step, at least.

    Args:
      parameters: numbers by part, see :func:`lmx.planning.plan.count_parts`.
      sizes: devices along each mesh axis.
      tokens: of a global batch.
      microbatches: parts that it is computed in.
    """
    model, found = config.model, []
    itemsize = jnp.dtype(model.dtype).itemsize
    layers = num_layers(model)
    own = sizes["tensor"] * sizes["stage"]
    shards = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    passes = 3 if model.remat == "full" else 2  # forward and backward, and forward again
    stages = sizes["stage"]
    ticks = microbatches * ((MICROBATCHES_A_STAGE + 1) * stages - 1 if stages > 1 else 1)  # that weights are needed in

    def add(kind: str, axes: tuple[str, ...], count: float, size: float) -> None:
        axes = tuple(axis for axis in axes if sizes[axis] > 1)
        if axes:
            found.append(Collective(kind, axes, math.prod(sizes[axis] for axis in axes), math.ceil(count), size))

    experts = parameters.get("experts", 0)
    dense = sum(parameters.values()) - experts
    for axes, params in ((GATHERED, dense / own), (("fsdp", "sequence"), experts / own / sizes["expert"])):
        if params:
            add("all-gather", axes, passes * layers / stages * ticks, passes * params * itemsize * ticks)
            add("reduce-scatter", axes, layers / stages * microbatches, params * itemsize * microbatches)
    whole = math.prod(sizes[axis] for axis in GATHERED) * own
    add(
        "all-reduce",
        ("data",),
        layers / stages * microbatches,
        sum(parameters.values()) / whole * FLOAT32 * microbatches,
    )

    stream = tokens / shards / sizes["sequence"] * model.embed_dim * itemsize / stages
    for kind in ("all-gather", "reduce-scatter"):
        add(kind, ("tensor",), 2 * passes * layers * microbatches, 2 * passes * layers * stream)
    kv_width = (model.num_kv_heads or model.num_heads) * (model.head_dim or model.embed_dim // model.num_heads)
    keys = 2 * tokens / shards * kv_width / sizes["tensor"] * itemsize / stages
    add("all-gather", ("sequence",), passes * layers * microbatches, passes * layers * keys)
    if model.experts.num_experts:
        sent = stream * model.experts.capacity_factor * model.experts.top_k
        sparse = layers / model.experts.every
        add("all-to-all", ("expert",), 2 * passes * sparse * microbatches, 2 * passes * sparse * sent)
    add("collective-permute", ("stage",), 2 * microbatches, 2 * stream * stages * config.mesh.stage_rounds)
    return sorted(found, key=lambda one: -one.sent)


def estimated_temporaries(
    config: Config,
    parameters: Mapping[str, int],
    sizes: Mapping[str, int],
    tokens: float,
    kept: float,
    accumulated: float,
) -> float:
    """Bytes that a device needs beside state, gradients and what the forward pass keeps.

    Weights of two layers, gathered (one is computed with while the next arrives), and a layer's gradient before it is
    scattered; what a layer's backward pass has to make first, because it was not kept; and the sum of gradients that
    another micro-batch's are added to.

    Args:
      tokens: that a device computes at once.
      kept: bytes that differentiation would keep on a device if no layer were recomputed.
      accumulated: bytes of a sum of gradients; none without micro-batches.
    """
    model = config.model
    itemsize = jnp.dtype(model.dtype).itemsize
    layers = num_layers(model)
    of_layers = sum(parameters.get(part, 0) for part in LAYERS)
    split = sizes["tensor"] * sizes["expert"] if model.experts.num_experts else sizes["tensor"]
    weights = of_layers / layers / split * (2 * itemsize + FLOAT32)
    # Norms and activation functions keep their arguments alone. Two norms have an input and an output each, and so has
    # the function, but for relu, of which the output says all.
    widths = 4 * model.embed_dim + (0 if model.activation == "relu" else 2 * model.mlp_dim)
    made = tokens / sizes["tensor"] * widths * FLOAT32
    if model.remat != "none":
        made += kept / layers
    if sizes["tensor"] > 1:  # a sub-layer's input and output and their gradients, of all of the length
        made += 4 * tokens * model.embed_dim * itemsize
    return weights + made + accumulated


def num_layers(model: Model) -> int:
    """Layers of all stacks."""
    two = model.architecture == "encoder_decoder"
    return model.num_layers + ((model.num_decoder_layers or model.num_layers) if two else 0)
