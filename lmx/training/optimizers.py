"""How parameters move: learning-rate schedules, update rules, and the parameters to evaluate with.

Every rule treats the layers of a scanned stack one by one, so that ``model.scan_layers`` changes the
compile time and nothing else. Where a parameter stands is told by its path, never by its rank: leaves
below ``layers`` are stacked over groups of layers, ``layers_0``, ``layers_1``, … are single ones.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree
from optax.contrib import MuonDimensionNumbers, ScheduleFreeState, scale_by_muon, schedule_free

from lmx.config import Optimizer
from lmx.errors import ConfigError
from lmx.model_config import Lora
from lmx.models.lora import ADAPTERS

# Liu et al. 2025 (arXiv:2502.16982, section 2.2): an orthogonal update of this RMS is as large as AdamW's
# usual one, so that Muon's matrices and AdamW's remaining parameters share one learning rate.
MUON_UPDATE_RMS = 0.2


class ParameterAverage(NamedTuple):
    """The running mean that :func:`average_parameters` keeps."""

    count: Int[Array, ""]
    mean: PyTree


def make_schedule(optimizer: Optimizer, steps: int) -> optax.Schedule:
    """The learning rate of an update, as a function of the number of updates made before it.

    The n-th update (n counts from 1) takes ``learning_rate * n / warmup_steps`` until the peak at
    ``n = warmup_steps``. From there the shapes are: ``constant``; ``linear`` and ``cosine``, which reach
    ``end_fraction`` of the peak at ``decay_steps``; ``wsd``, constant and then linear over the last
    ``decay_fraction`` (Hu et al. 2024, section 4); ``inverse_sqrt``, ``sqrt(warmup_steps / n)`` without an
    end (Vaswani et al. 2017, equation 3; T5).

    Args:
      optimizer: the config's section.
      steps: updates in all, where ``optimizer.decay_steps`` is none.
    """
    warmup, last, end = max(optimizer.warmup_steps, 1), optimizer.decay_steps or steps, optimizer.end_fraction

    def progress(n: Float[Array, ""], start: float) -> Float[Array, ""]:
        return jnp.clip((n - start) / max(last - start, 1), 0, 1)

    shapes: dict[str, Callable] = {
        "constant": lambda n: 1.0,
        "linear": lambda n: 1 - (1 - end) * progress(n, optimizer.warmup_steps),
        "cosine": lambda n: end + (1 - end) * (1 + jnp.cos(jnp.pi * progress(n, optimizer.warmup_steps))) / 2,
        "inverse_sqrt": lambda n: jnp.sqrt(warmup / jnp.maximum(n, warmup)),
        "wsd": lambda n: 1 - (1 - end) * progress(n, last * (1 - optimizer.decay_fraction)),
    }
    shape = shapes[optimizer.schedule]

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        n = jnp.asarray(step, jnp.float32) + 1
        return optimizer.learning_rate * jnp.minimum(n / warmup, 1) * shape(n)

    return schedule


def make_optimizer(
    optimizer: Optimizer, steps: int, params: PyTree, lora: Lora | None = None
) -> optax.GradientTransformation:
    """The whole update: clipping, rule, weight decay, learning rate, and what is averaged or frozen.

    Rules, by ``optimizer.name``:

    - ``adamw`` (Loshchilov & Hutter 2019), ``lion`` (Chen et al. 2023), ``sgd`` with momentum ``b1``.
    - ``lamb`` (You et al. 2020, algorithm 2): as in the authors' code, the trust ratio is for matrices only.
    - ``adafactor`` (Shazeer & Stern 2018, algorithm 4): steps relative to the parameter's RMS, no first
      moment; ``b1``, ``b2`` and ``epsilon`` are the paper's, not the config's.
    - ``muon`` (Jordan 2024) for the stacks' matrices, at AdamW's RMS; AdamW for everything else.
    - ``schedule_free_adamw`` (Defazio et al. 2024): averages by itself; meant for ``schedule="constant"``.

    Weight decay is decoupled and multiplied by the learning rate; biases, norm scales and T5's relative
    biases have none.

    Args:
      optimizer: the config's section.
      steps: updates in all, for the schedule.
      params: the parameters, or their shapes; only paths and shapes are read.
      lora: of the model, which says what is trained beside adapters.

    Raises:
      ConfigError: two ways of averaging at once, or nothing left to train.
    """
    if optimizer.name == "schedule_free_adamw" and (optimizer.ema_decay or not optimizer.b1):
        raise ConfigError(
            "optimizer.name='schedule_free_adamw' averages the parameters with weight b1: it needs optimizer.b1 > 0 "
            f"and optimizer.ema_decay = 0; found {optimizer.b1} and {optimizer.ema_decay}."
        )
    if optimizer.freeze_body and not params.get("heads"):
        raise ConfigError(
            "optimizer.freeze_body trains the heads alone, and this model's heads have no parameters of their own: "
            "unset it, or set model.tie_embeddings=False."
        )
    schedule = make_schedule(optimizer, steps)
    update = optax.chain(
        *_rule(optimizer),
        _scale_layers(optimizer.layer_decay, params) if optimizer.layer_decay != 1 else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )
    if optimizer.name == "schedule_free_adamw":  # counts from 1 where every other transformation counts from 0
        update = schedule_free(update, lambda count: schedule(count - 1), b1=optimizer.b1)
    if optimizer.clip_norm:
        update = optax.chain(_clip_by_global_norm(optimizer.clip_norm), update)
    if optimizer.ema_decay:
        update = optax.chain(update, average_parameters(optimizer.ema_decay))
    mask = trainable(optimizer, params, lora)
    if not all(jax.tree.leaves(mask)):
        labels = jax.tree.map(lambda trained: "train" if trained else "freeze", mask)
        update = optax.partition({"train": update, "freeze": optax.set_to_zero()}, labels)
    return update


def trainable(optimizer: Optimizer, params: PyTree, lora: Lora | None = None) -> PyTree:
    """For each parameter whether it is trained.

    With adapters these are, and the heads that ``lora.heads`` names; else the heads where the body is frozen; else all.
    """
    heads = (lora or Lora()).heads
    if any(jax.tree.leaves(_by_name(lambda names, _: names[-1] in ADAPTERS, params))):
        return _by_name(lambda names, _: names[-1] in ADAPTERS or (names[0] == "heads" and names[1] in heads), params)
    return _by_name(lambda names, _: names[0] == "heads" or not optimizer.freeze_body, params)


def eval_params(state: Any) -> PyTree:
    """The parameters to evaluate and generate with.

    Args:
      state: a ``TrainState``.

    Returns:
      The running mean (``ema_decay``), the average x of schedule-free training, or else ``state.params``
      itself. Frozen parameters are themselves.
    """

    def averages(node: Any) -> bool:
        return isinstance(node, ParameterAverage | ScheduleFreeState)

    def known(choose: Callable, other: PyTree) -> PyTree:
        """Applies ``choose`` wherever the optimizer holds another value of the parameter, which may be offloaded."""

        def value(param: jax.Array, held: Any) -> jax.Array:
            return param if isinstance(held, optax.MaskedNode) else choose(param, jax.device_put(held, param.sharding))

        return jax.tree.map(value, state.params, other)

    for node in jax.tree.leaves(state.opt_state, is_leaf=averages):
        if isinstance(node, ParameterAverage):
            return known(lambda _, mean: mean, node.mean)
        if isinstance(node, ScheduleFreeState):  # params are y = (1 - b1) z + b1 x
            return known(lambda y, z, b1=node.b1: (y - (1 - b1) * z) / b1, node.z)
    return state.params


def average_parameters(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential running mean of the parameters after each update; updates pass unchanged.

    The decay rises as ``min(decay, (1 + n) / (10 + n))`` with the number n of updates, so that the first
    random parameters do not linger in the mean.
    """

    def init(params: PyTree) -> ParameterAverage:
        return ParameterAverage(jnp.zeros([], jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates: PyTree, state: ParameterAverage, params: PyTree) -> tuple[PyTree, ParameterAverage]:
        rate = 1 - jnp.minimum(decay, (1 + state.count) / (10 + state.count))
        moved = optax.apply_updates(params, updates)
        mean = jax.tree.map(lambda old, new: (old + rate * (new - old)).astype(old.dtype), state.mean, moved)
        return updates, ParameterAverage(optax.safe_increment(state.count), mean)

    return optax.GradientTransformation(init, update)


def per_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies a rule that looks at a parameter as a whole (its norm, its rows) to each layer's own part.

    The rule runs on every parameter by itself, mapped over the leading axis of a scanned stack's. Its state
    has the tree of the parameters, with the rule's own state at each leaf.
    """

    def mapped(path: tuple, function: Callable) -> Callable:
        return jax.vmap(function) if "layers" in _names(path) else function

    def init(params: PyTree) -> PyTree:
        return jax.tree.map_with_path(lambda path, p: mapped(path, rule.init)(p), params)

    def update(updates: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        def one(path: tuple, *leaf: Any) -> tuple[Array, Any]:
            return mapped(path, rule.update)(*leaf)

        tree = jax.tree.structure(updates)
        pairs = tree.flatten_up_to(jax.tree.map_with_path(one, updates, state, params))
        return tree.unflatten([u for u, _ in pairs]), tree.unflatten([s for _, s in pairs])

    return optax.GradientTransformation(init, update)


def _rule(optimizer: Optimizer) -> tuple[optax.GradientTransformation, ...]:
    """The direction to move in, weight decay included."""
    b1, b2, epsilon = optimizer.b1, optimizer.b2, optimizer.epsilon
    adam = optax.scale_by_adam(b1, b2, epsilon)
    decay = optax.identity()
    if optimizer.weight_decay:
        decay = optax.add_decayed_weights(optimizer.weight_decay, mask=_matrices)
    relative_step = optax.chain(
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
    )
    rules = {
        "adamw": (adam, decay),
        "adafactor": (per_layer(relative_step), decay),
        "lamb": (adam, decay, optax.masked(per_layer(optax.scale_by_trust_ratio()), _matrices)),
        "lion": (optax.scale_by_lion(b1, b2), decay),
        "muon": (optax.partition({"muon": _orthogonalize(b1), "adam": adam}, _muon_labels), decay),
        "schedule_free_adamw": (  # momentum comes from the averaging: Adam with b1 = 0
            optax.scale_by_rms(b2, epsilon, eps_in_sqrt=False, bias_correction=True),
            decay,
        ),
        "sgd": (optax.trace(b1) if b1 else optax.identity(), decay),
    }
    return rules[optimizer.name]


def _orthogonalize(momentum: float) -> optax.GradientTransformation:
    """Muon on matrices, at the update RMS of AdamW."""

    def axes(tree: PyTree) -> PyTree:
        return _by_name(lambda names, _: _matrix_axes(names), tree)

    def match_rms(updates: PyTree) -> PyTree:
        def scale(names: tuple[str, ...], update: Array) -> Array:
            sides = [math.prod(update.shape[axis] for axis in side) for side in _matrix_axes(names)]
            return MUON_UPDATE_RMS * math.sqrt(max(sides)) * update

        return _by_name(scale, updates)

    return optax.chain(
        scale_by_muon(beta=momentum, weight_dimension_numbers=axes), optax.stateless(lambda u, _: match_rms(u))
    )


def _matrix_axes(names: tuple[str, ...]) -> MuonDimensionNumbers:
    """Which axes of a layer's kernel are its input and its output; all others (layers, experts) are a batch."""
    if "attention" not in names[-3]:
        return MuonDimensionNumbers((-2,), (-1,))  # [embed, mlp] and back
    if names[-2] == "out":
        return MuonDimensionNumbers((-3, -2), (-1,))  # [heads, head_dim, embed]
    return MuonDimensionNumbers((-3,), (-2, -1))  # [embed, heads, head_dim]


def _muon_labels(tree: PyTree) -> PyTree:
    """Muon is for hidden layers: embeddings, heads, and the router that classifies tokens, are AdamW's."""

    def label(names: tuple[str, ...], _: Any) -> str:
        hidden = names[0] in ("encoder", "decoder") and names[-1] == "kernel" and "router" not in names
        return "muon" if hidden else "adam"

    return _by_name(label, tree)


def _matrices(tree: PyTree) -> PyTree:
    """True for kernels and embedding tables: what is decayed."""
    return _by_name(lambda names, _: names[-1] in ("kernel", "table") and "relative_bias" not in names, tree)


def _clip_by_global_norm(norm: float) -> optax.GradientTransformation:
    """Gradients made shorter, all together, where they are longer than ``norm`` (Pascanu et al. 2013, algorithm 1).

    optax divides each by the norm, and a compiler for CPUs will not divide twice: it stores the quotients for the
    moments to read, one pass over memory more. A product with one factor it does again.
    """

    def update(gradients: PyTree, state: optax.EmptyState, params: PyTree | None = None):
        factor = norm / jnp.maximum(optax.tree.norm(gradients), norm)
        return jax.tree.map(lambda gradient: gradient * factor.astype(gradient.dtype), gradients), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _scale_layers(layer_decay: float, params: PyTree) -> optax.GradientTransformation:
    """Multiplies updates by ``layer_decay ** distance`` (Howard & Ruder 2018, section 3.2).

    The distance is 0 at the heads and what stands above the topmost layer, 1 at that layer, and one more
    than the deepest layer's at the embeddings. An encoder lies below its decoder.
    """
    layers = {stack: _num_layers(params[stack]) for stack in ("encoder", "decoder") if stack in params}
    above = {"decoder": 0, "encoder": layers.get("decoder", 0), "embeddings": sum(layers.values()) + 1}

    def distance(names: tuple[str, ...], update: Array) -> int | Array:
        base = above.get(names[0], 0)
        if names[0] not in layers:
            return base
        if names[1] == "layers":
            period = len(params[names[0]]["layers"])
            index = jnp.arange(update.shape[0]) * period + int(names[2].removeprefix("block_"))
            return (base + layers[names[0]] - index).reshape(-1, *(1,) * (update.ndim - 1))
        single = re.fullmatch(r"layers_(\d+)", names[1])
        return base + layers[names[0]] - int(single[1]) if single else base

    def scale(updates: PyTree) -> PyTree:
        return _by_name(lambda names, u: u * jnp.float32(layer_decay) ** distance(names, u), updates)

    return optax.stateless(lambda updates, _: scale(updates))


def _num_layers(stack: dict[str, Any]) -> int:
    if "layers" in stack:
        return sum(jax.tree.leaves(block)[0].shape[0] for block in stack["layers"].values())
    return sum(name.startswith("layers_") for name in stack)


def _by_name(function: Callable[[tuple[str, ...], Any], Any], tree: PyTree) -> PyTree:
    """Maps ``function(names on the way to the leaf, leaf)`` over a tree of nested dicts."""
    return jax.tree.map_with_path(lambda path, leaf: function(_names(path), leaf), tree)


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", key)) for key in path)
