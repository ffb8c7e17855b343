"""What a run takes: parameters, FLOPs, bytes a device, what is sent, and the time that no step can beat.

Conventions. A FLOP count is that of :func:`lmx.models.flops.forward_flops` (a multiply-add is two; of a causal row's
attention the half that is seen; lookups nothing), and training is three times it. Memory is what the compiler says of
the whole program; the part of it that is gradients is computed from the parameters, the part that is activations from
what differentiation keeps, spread evenly over the devices. Where there is no compiler for the devices, temporaries and
what is sent are estimated (:mod:`lmx.planning.estimates`), and whatever shows the plan says so. Times are roofs: the
FLOPs at the device's peak, the bytes that memory must move at its bandwidth, and what the program sends at the links'
bandwidth, each as if it were alone. The longest bounds the step.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from lmx.config import Config
from lmx.kernels.attention import FUSED
from lmx.models.heads import num_params
from lmx.models.transformer import Transformer
from lmx.parallel.hardware import Hardware
from lmx.parallel.pipeline import stage_microbatches
from lmx.parallel.sharding import use_layout
from lmx.planning.collectives import Collective, find_collectives
from lmx.planning.estimates import estimated_collectives, estimated_temporaries
from lmx.planning.program import Program, compile_program, num_bytes
from lmx.planning.targets import Target
from lmx.training.experiment import Experiment
from lmx.training.state import step_rngs
from lmx.training.step import loss_terms

GPU_FRACTION = 0.92  # of a GPU's memory that a program can have: the CUDA context, NCCL and cuDNN take the rest
PARTS = {  # by the first module of a parameter's path that is one of these; what is in none of them is a norm
    "experts": "experts",
    "attention": "attention",
    "cross_attention": "attention",
    "relative_bias": "attention",
    "mlp": "feed-forward",
    "embeddings": "embeddings",
    "heads": "heads",
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      parameters, optimizer, batch: what goes into a step and out of it again.
      gradients: float32, laid out as the parameters that are trained.
      activations: what the forward pass keeps for the backward pass, of the rows computed at once.
      temporaries: whatever else the compiled program needs at its peak.
      total: of the compiled program, or the sum of the parts where there is no compiler; none if it does not compile.
      capacity: of the device; none where that is not known.
    """

    parameters: float
    optimizer: float
    batch: float
    gradients: float
    activations: float
    temporaries: float
    total: float | None
    capacity: float | None

    @property
    def fits(self) -> bool | None:
        """Whether it does; none where the capacity is not known."""
        if self.total is None:
            return False
        return None if self.capacity is None else self.total <= self.capacity


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step that each resource needs at least.

    Attributes:
      matmul: the FLOPs, with what is recomputed, at the peak.
      memory: weights, optimizer state and activations at the memory's bandwidth.
      network: collectives at the links' bandwidth.
      bubble: fraction of a step that a pipeline's stages are idle.
    """

    matmul: float
    memory: float
    network: float
    bubble: float

    @property
    def step(self) -> float:
        """The longest of them, and the idle time."""
        return max(self.matmul, self.memory, self.network) / (1 - self.bubble)

    @property
    def limit(self) -> str:
        """What the longest is."""
        names = {"matmul": self.matmul, "memory": self.memory, "network": self.network}
        return max(names, key=names.get)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that is known of a run beforehand.

    Attributes:
      parameters: numbers by part of the model.
      flops_per_token: forward; training is three times that.
      tokens: of a global batch.
      collectives: of the compiled program, or estimated where there is no compiler.
      times: none where the devices' speeds are not known.
    """

    config: Config
    target: Target
    program: Program
    parameters: dict[str, int]
    flops_per_token: float
    tokens: int
    memory: Memory
    collectives: list[Collective]
    times: Times | None

    @property
    def utilization(self) -> float | None:
        """The bound of the model FLOPs utilization (PaLM, appendix B)."""
        if self.times is None:
            return None
        peak = self.target.hardware.peak_flops * len(self.target.devices)
        return 3 * self.flops_per_token * self.tokens / (self.times.step * peak)

    @property
    def hours(self) -> float | None:
        """Of all of the config's steps, at the bound."""
        return None if self.times is None else self.times.step * self.config.train.steps / 3600


def make_plan(config: Config, target: Target) -> Plan:
    """Compiles ``config`` for ``target`` and reads off what it would take.

    Raises:
      LmxError: the config does not fit the devices, or the compiler fails for another reason than memory.
    """
    program = compile_program(config, target)
    experiment = program.experiment
    tokens, flops_per_token = tokens_and_flops(experiment)
    parameters, kept = count_parts(experiment.abstract_params), kept_activations(experiment, program.batch)
    memory = _memory(program, target, kept, parameters)
    collectives = []
    if program.compiled is not None:
        collectives = find_collectives(program.compiled.as_text(), experiment.mesh)
    elif target.lacks:
        sizes = experiment.mesh.shape
        collectives = estimated_collectives(config, parameters, sizes, tokens, experiment.split.microbatches)
    times = target.hardware and _times(program, target.hardware, 3 * flops_per_token * tokens, kept, collectives)
    return Plan(config, target, program, parameters, flops_per_token, tokens, memory, collectives, times)


def tokens_and_flops(experiment: Experiment) -> tuple[int, float]:
    """Tokens of a global batch, and FLOPs of the forward pass for each."""
    tokens, flops = experiment.row_tokens_and_flops()
    return experiment.config.train.global_batch_size * tokens, flops / tokens


def count_parts(params: Any) -> dict[str, int]:
    """Parameters by part of the model, from the tree of them or of their shapes."""
    counts: dict[str, int] = {}
    for path, leaf in jax.tree.leaves_with_path(nn.meta.unbox(params)):
        part = next((PARTS[key.key] for key in path if key.key in PARTS), "norms")
        counts[part] = counts.get(part, 0) + math.prod(leaf.shape)
    return counts


def kept_activations(
    experiment: Experiment, batch: dict[str, jax.ShapeDtypeStruct], model: Transformer | None = None
) -> float:
    """Bytes that differentiation keeps of the rows that are computed at once, over all devices together.

    Args:
      model: in place of the experiment's own.
    """
    config = (model or experiment.model).config
    if {form.name for form in experiment.attention_forms()} & set(FUSED.values()):
        config = dataclasses.replace(config, attention="blockwise")  # keeps the same, and is traced without libraries
    model = Transformer(config)
    rows = experiment.split.shards * experiment.split.rows_per_device
    part = {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in batch.items()}
    params = nn.meta.unbox(experiment.abstract_params)

    def backward(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            terms = loss_terms(model, experiment.objective, params, batch, step_rngs(0, 0))
            return sum(terms[name][0] for name in experiment.objective.optimized)

        return jax.vjp(loss, params)[1]

    own = {(x.shape, x.dtype) for x in jax.tree.leaves(params)}
    with use_layout(experiment.layout):
        found = jax.tree.leaves(jax.eval_shape(backward, params, part))
    kept = [x for x in found if (x.shape, x.dtype) not in own]
    return float(sum(x.size * x.dtype.itemsize for x in kept if hasattr(x.dtype, "itemsize")))


def _memory(program: Program, target: Target, kept: float, parts: dict[str, int]) -> Memory:
    state, experiment = program.state, program.experiment
    trained = [
        leaf for leaf, on in zip(*map(jax.tree.leaves, (state.params, experiment.trainable())), strict=True) if on
    ]
    parameters = num_bytes(state.params)
    optimizer = 0 if experiment.config.optimizer.offload else num_bytes(state.opt_state)
    batch, gradients = num_bytes(program.batch), num_bytes(trained)
    activations, total, temporaries = kept / experiment.mesh.size, None, 0.0
    if program.compiled is not None:
        found = program.compiled.memory_analysis()
        state_bytes = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        total = float(state_bytes + found.temp_size_in_bytes + found.generated_code_size_in_bytes)
        rest = total - parameters - optimizer - batch
        gradients = min(gradients, rest)  # a compiler may use each gradient as soon as it has it
        activations = min(activations, rest - gradients)
        temporaries = rest - gradients - activations
    elif target.lacks:
        split, sizes = experiment.split, experiment.mesh.shape
        tokens = split.rows_per_device * max(experiment.objective.lengths.values()) / sizes["sequence"]
        unsaved = Transformer(dataclasses.replace(experiment.model.config, remat="none"))
        every = kept_activations(experiment, program.batch, unsaved) / experiment.mesh.size
        accumulated = gradients if split.microbatches > 1 else 0
        temporaries = estimated_temporaries(experiment.config, parts, sizes, tokens, every, accumulated)
        total = parameters + optimizer + batch + gradients + activations + temporaries
    capacity = target.hardware and target.hardware.memory * (1 if target.hardware.is_tpu else GPU_FRACTION)
    return Memory(parameters, optimizer, batch, gradients, activations, temporaries, total, capacity)


def _times(
    program: Program, hardware: Hardware, train_flops: float, kept: float, collectives: list[Collective]
) -> Times:
    experiment, devices = program.experiment, program.experiment.mesh.size
    config, mesh, split = experiment.config, experiment.mesh, experiment.split
    passes = {"full": 4 / 3}.get(config.model.remat, 1.0)  # of dots, little but matrix products is computed again
    state = num_bytes(program.state.params) + num_bytes(program.state.opt_state)
    gradients = num_bytes(program.state.params)
    itemsize = jax.numpy.dtype(config.model.dtype).itemsize
    shared = math.prod(mesh.shape[axis] for axis in ("tensor", "expert", "stage"))
    weights = num_params(program.state.params) * itemsize / shared * split.microbatches * 3 * passes
    traffic = 2 * (state + gradients) + weights + 2 * kept / devices * split.microbatches
    stages, bubble = mesh.shape["stage"], 0.0
    if stages > 1:
        turns = stage_microbatches(split.rows_per_device, experiment.layout) * experiment.layout.stage_rounds
        bubble = (stages - 1) / (turns + stages - 1)
    network = sum(one.sent / bandwidth(one, mesh, hardware) for one in collectives)
    return Times(
        passes * train_flops / (devices * hardware.peak_flops), traffic / hardware.memory_bandwidth, network, bubble
    )


def bandwidth(collective: Collective, mesh: jax.sharding.Mesh, hardware: Hardware) -> float:
    """Bytes a second at which a device sends in this collective.

    On a torus a ring has both directions of one dimension. Between GPUs of a node it has the fast link; beyond it, each
    member that a group has in a node sends a part of the node's share.
    """
    if hardware.is_tpu:
        return 2 * hardware.link_bandwidth
    along = tuple(slice(None) if axis in collective.axes else 0 for axis in mesh.axis_names)
    sizes = tuple(mesh.shape[axis] for axis in mesh.axis_names)
    group = np.arange(math.prod(sizes)).reshape(sizes)[along]  # the devices of a node are neighbours in the mesh
    local = int((group < hardware.node).sum())
    if local >= collective.size:
        return hardware.link_bandwidth
    return min(hardware.link_bandwidth, hardware.network_bandwidth * local)
