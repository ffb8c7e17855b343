"""The Switch layer: a feed-forward network of which each token uses one expert (Fedus et al. 2021, section 2), or
a few (Mixtral: Jiang et al. 2024, section 2.1).

Routing groups are rows of the batch. Capacity and losses are therefore a property of a row alone, and do not
change with micro-batches, devices or hosts.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lmx.kernels.dispatch import Places, combine, dispatch
from lmx.kernels.int8 import Quantized
from lmx.kernels.products import product
from lmx.model_config import Model
from lmx.models.feed_forward import activate, is_gated
from lmx.models.layers import PRODUCT, Dropout, Projection, kernel_init, offer_quantized, residual_scale
from lmx.parallel.sharding import constrain, current_layout, current_platform

NAMES = {
    "slots": "through as many slots of each expert as its capacity",
    "groups": "sorted by expert and multiplied in groups",
    "every": "every expert computes every token",
}


@dataclasses.dataclass(frozen=True)
class ExpertForm:
    """How tokens reach their experts.

    Attributes:
      name: slots, groups or every.
      reason: why they are not in groups, where nothing limits an expert's capacity and they could be.
    """

    name: str
    reason: str = ""

    def __str__(self) -> str:
        return NAMES[self.name] + (f" ({self.reason})" if self.reason else "")


def expert_form(config: Model, train: bool = True) -> ExpertForm:
    """The form that a model's experts have on the current layout's devices, in training or else."""
    if config.experts.slots(1, train):
        return ExpertForm("slots")
    layout = current_layout()
    if current_platform() not in ("gpu", "tpu"):
        return ExpertForm(
            "every", f"for products in groups a {current_platform()} goes through all groups for all rows"
        )
    if layout is not None and layout.mesh.size > 1:
        return ExpertForm("every", f"no group is split over {layout.mesh.size} devices")
    if config.products != "dtype":
        return ExpertForm("every", f"model.products={config.products!r} has no products in groups")
    return ExpertForm("groups")


@struct.dataclass
class Routing:
    """Where each token goes.

    Attributes:
      chosen: the experts that each token would be sent to, the first choice first.
      gates: the factor on each expert's output; 0 where the token is not sent, or found the expert full.
      slots: the token's place among those sent to that expert, from 0; -1 where it is not sent or the expert is full.
      load_balance: the paper's equation 4 without alpha, a value a row.
      router_z: the mean squared log-partition of the router (Zoph et al. 2022, equation 5), a value a row.
      dropped: fraction of a row's choices that found their expert full.
    """

    chosen: Int[Array, "batch length k"]
    gates: Float[Array, "batch length experts"]
    slots: Int[Array, "batch length experts"]
    load_balance: Float[Array, " batch"]
    router_z: Float[Array, " batch"]
    dropped: Float[Array, " batch"]


def route(
    logits: Float[Array, "batch length experts"],
    segments: Int[Array, "batch length"],
    capacity: int,
    top_k: int = 1,
    normalize: bool = False,
) -> Routing:
    """Top-k routing with capacity. Padding (segment 0) goes nowhere.

    Earlier tokens have precedence, and all first choices come before second ones (GShard: Lepikhin et al. 2020,
    algorithm 1). Equations of Fedus et al. 2021: ``loss = N sum_i f_i P_i`` (4), ``f_i`` the fraction of tokens sent
    to expert i (5; it sums to k), ``P_i`` the mean probability of expert i (6); means are over a row's tokens.

    Args:
      capacity: slots of an expert; 0 is no limit.
      top_k: experts that a token is sent to.
      normalize: the gates of a token sum to 1; else they are the router's probabilities.
    """
    batch, length, num_experts = logits.shape
    real = (segments > 0).astype(jnp.float32)
    count = jnp.maximum(real.sum(-1), 1.0)  # a row of padding alone has losses of zero
    probabilities = jax.nn.softmax(logits, axis=-1)
    gates, chosen = jax.lax.top_k(probabilities, top_k)
    if normalize:
        gates /= gates.sum(-1, keepdims=True)
    choices = jax.nn.one_hot(chosen, num_experts) * real[..., None, None]  # [batch, length, k, experts]
    sent = choices.sum(2)
    in_order = choices.swapaxes(1, 2).reshape(batch, top_k * length, num_experts)  # all first choices come first
    place = (jnp.cumsum(in_order, axis=1) * in_order).reshape(batch, top_k, length, num_experts).sum(1)
    kept = sent * (place <= capacity) if capacity else sent
    fraction = sent.sum(1) / count[:, None]
    mean_probability = (probabilities * real[..., None]).sum(1) / count[:, None]
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    return Routing(
        chosen=chosen,
        gates=(choices * gates[..., None]).sum(2) * kept,
        slots=(place * kept).astype(jnp.int32) - 1,
        load_balance=num_experts * (fraction * mean_probability).sum(-1),
        router_z=(log_partition**2 * real).sum(-1) / count,
        dropped=(sent - kept).sum((1, 2)) / (top_k * count),
    )


class ExpertProjection(nn.Module):
    """``x[:, i] @ kernel[i] + bias[i]`` for every expert i; or, with ``sizes``, of rows that stand expert by expert,
    so many each."""

    config: Model
    features: int
    axes: tuple[str, str, str]
    init_scale: float = 1.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch inputs"], sizes: Int[Array, " experts"] | None = None
    ) -> Float[Array, "*batch outputs"]:
        config, experts = self.config, self.config.experts.num_experts
        dtype = jnp.dtype(config.dtype)
        init = kernel_init(config, scale=self.init_scale, batched=True)
        shape = (experts, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.with_logical_partitioning(init, self.axes), shape)
        offer_quantized(self, kernel, (1,))
        scale, bias = None, None
        if isinstance(kernel, Quantized):
            kernel, scale = kernel.values.astype(dtype), kernel.scale[:, 0].astype(dtype)
        if config.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, (self.axes[0], self.axes[2]))
            bias = self.param("bias", init, (experts, self.features)).astype(dtype)
        if sizes is None:
            of_one = functools.partial(product, numbers=config.products if scale is None else "dtype")
            y = checkpoint_name(jax.vmap(of_one, in_axes=(1, 0), out_axes=1)(x, kernel), PRODUCT)
            scale, bias = (None if of is None else of[:, None] for of in (scale, bias))
        else:
            y = jax.lax.ragged_dot(x, kernel.astype(dtype), sizes)
            own = jnp.repeat(jnp.arange(experts), sizes, total_repeat_length=len(x))
            scale, bias = (None if of is None else of[own] for of in (scale, bias))
        y = y if scale is None else y * scale
        return y if bias is None else y + bias


class SwitchFeedForward(nn.Module):
    """Sparse feed-forward. Tokens that find their expert full get zero here, and so pass by the residual.

    Without a limit of capacity nothing is dropped. On one GPU or TPU the choices are sorted by expert and multiplied in
    groups; elsewhere every expert computes every token, at ``experts / top_k`` times the work, and the gates choose.

    Sows into collection "experts", a value a row: ``load_balance`` and ``router_z`` times their weights (to be
    added to the loss), and ``dropped``.
    """

    config: Model

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length embed"], segments: Int[Array, "batch length"], train: bool = False
    ) -> Float[Array, "batch length embed"]:
        config = self.config
        capacity = self.config.experts.slots(x.shape[1], train)
        routing = self._route(x, segments, capacity, train)
        dtype = jnp.dtype(config.dtype)
        x, gates = x.astype(dtype), routing.gates.astype(dtype)
        form = expert_form(config, train).name
        if form == "slots":
            return self._through_slots(x, gates, routing, capacity, train)
        if form == "groups":
            return self._grouped(x, gates, routing.chosen, train)
        every = jnp.broadcast_to(x[:, None], (x.shape[0], config.experts.num_experts, *x.shape[1:]))
        return jnp.einsum("blx,bxle->ble", gates, self._experts(every, train))

    def _grouped(self, x, gates, chosen, train):
        """Every choice through its own expert and no other, sorted by expert (Gale et al. 2022, section 4)."""
        (batch, length, embed), k = x.shape, chosen.shape[2]
        experts = chosen.reshape(-1)
        order = jnp.argsort(experts)  # of choices, expert by expert
        places = Places(jnp.argsort(order).reshape(1, batch * length, k), order[None])
        sent = dispatch(x.reshape(1, batch * length, embed), places)[0]
        output = self._experts(sent, train, jnp.bincount(experts, length=self.config.experts.num_experts))
        gates = jnp.take_along_axis(gates, chosen, axis=2).reshape(1, batch * length, k)
        return combine(output[None], gates, places).reshape(x.shape)

    def _through_slots(self, x, gates, routing, capacity, train):
        """Tokens to the slots of their experts, through those, and back."""
        experts, names = self.config.experts.num_experts, ("batch", None, "capacity", None)
        slots, gates = (jnp.take_along_axis(of, routing.chosen, axis=2) for of in (routing.slots, gates))
        places = Places.of(
            jnp.where(slots < 0, experts * capacity, routing.chosen * capacity + slots), experts * capacity
        )
        sent = dispatch(x, places).reshape(x.shape[0], experts, capacity, -1)
        output = constrain(self._experts(constrain(sent, *names), train), *names)
        return combine(output.reshape(x.shape[0], experts * capacity, -1), gates, places)

    def _experts(self, slots, train, sizes=None):
        """Each expert's feed-forward network over its slots, which come from where their rows are and go back; with
        ``sizes``, over rows that stand expert by expert on one device."""
        config = self.config
        names = ("expert_batch", "experts", "capacity") if sizes is None else (None,)
        slots = constrain(slots, *names, None)
        axes = ("experts", "embed", "mlp")
        hidden = ExpertProjection(config, config.mlp_dim, axes, name="in")(slots, sizes)
        gate = None
        if is_gated(config):
            gate = ExpertProjection(config, config.mlp_dim, axes, name="gate")(slots, sizes)
        hidden = activate(config, hidden, gate)
        hidden = constrain(hidden, *names, "mlp")
        hidden = Dropout(max(config.experts.dropout, config.mlp_dropout))(hidden, train)
        axes = ("experts", "mlp", "embed")
        output = ExpertProjection(config, config.embed_dim, axes, residual_scale(config), name="out")(hidden, sizes)
        return constrain(output, *names, None)

    def _route(self, x, segments, capacity, train):
        """Router in float32, whatever the compute type (section 2.4)."""
        experts = self.config.experts
        x = x.astype(jnp.float32)
        if train and experts.jitter:
            noise = jax.random.uniform(self.make_rng("jitter"), x.shape, minval=-experts.jitter, maxval=experts.jitter)
            x *= 1.0 + noise
        config = dataclasses.replace(self.config, dtype="float32", products="dtype")
        axes = ("embed", "experts")
        logits = Projection(config, (experts.num_experts,), axes, use_bias=False, name="router")(x)
        routing = route(logits, segments, capacity, experts.top_k, experts.normalize_gates)
        self._sow("load_balance", experts.load_balance_weight * routing.load_balance)
        self._sow("router_z", experts.z_loss_weight * routing.router_z)
        self._sow("dropped", routing.dropped)
        self.sow("intermediates", "gates", routing.gates)
        return routing

    def _sow(self, name, value):
        self.sow("experts", name, value, init_fn=lambda: 0.0, reduce_fn=lambda _, new: new)
