"""The Switch layer: a feed-forward network of which each token uses one expert (Fedus et al. 2021, section 2).

Routing groups are rows of the batch. Capacity and losses are therefore a property of a row alone, and do not
change with micro-batches, devices or hosts.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from lmx.config import Model
from lmx.models.feed_forward import ACTIVATIONS, is_gated
from lmx.models.layers import Projection, kernel_init, residual_scale


@struct.dataclass
class Routing:
    """Where each token goes.

    Attributes:
      dispatch: 1 where the token fills that slot of that expert.
      combine: the same times the router's probability.
      load_balance: the paper's equation 4 without alpha, a value a row.
      router_z: the mean squared log-partition of the router (Zoph et al. 2022, equation 5), a value a row.
      dropped: fraction of a row's tokens that found their expert full.
    """

    dispatch: Float[Array, "batch length experts capacity"]
    combine: Float[Array, "batch length experts capacity"]
    load_balance: Float[Array, " batch"]
    router_z: Float[Array, " batch"]
    dropped: Float[Array, " batch"]


def expert_capacity(length: int, num_experts: int, capacity_factor: float) -> int:
    """Slots of an expert in a row: tokens / experts * capacity factor (equation 3), rounded up, at least one."""
    slots = round(length / num_experts * capacity_factor, 6)  # 100 / 10 * 1.1 is 11, not 11.000000000000002
    return min(length, max(1, math.ceil(slots)))


def route(logits: Float[Array, "batch length experts"], segments: Int[Array, "batch length"], capacity: int) -> Routing:
    """Top-1 routing with capacity; earlier tokens have precedence. Padding (segment 0) goes nowhere.

    Equations of Fedus et al. 2021: ``loss = N sum_i f_i P_i`` (4), ``f_i`` the fraction of tokens whose largest
    probability is expert i's (5), ``P_i`` the mean probability of expert i (6); means are over a row's tokens.
    """
    num_experts = logits.shape[-1]
    real = (segments > 0).astype(jnp.float32)
    count = jnp.maximum(real.sum(-1), 1.0)  # a row of padding alone has losses of zero
    probabilities = jax.nn.softmax(logits, axis=-1)
    gate = probabilities.max(-1) * real
    chosen = jax.nn.one_hot(probabilities.argmax(-1), num_experts) * real[..., None]
    slot = (jnp.cumsum(chosen, axis=1) * chosen).sum(-1).astype(jnp.int32) - 1  # -1 for padding: no slot
    dispatch = chosen[..., None] * jax.nn.one_hot(slot, capacity)[:, :, None, :]  # beyond capacity: no slot
    fraction = chosen.sum(1) / count[:, None]
    mean_probability = (probabilities * real[..., None]).sum(1) / count[:, None]
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    return Routing(
        dispatch=dispatch,
        combine=dispatch * gate[:, :, None, None],
        load_balance=num_experts * (fraction * mean_probability).sum(-1),
        router_z=(log_partition**2 * real).sum(-1) / count,
        dropped=(real.sum(-1) - dispatch.sum((1, 2, 3))) / count,
    )


class ExpertProjection(nn.Module):
    """``x[:, i] @ kernel[i] + bias[i]`` for every expert i."""

    config: Model
    features: int
    axes: tuple[str, str, str]
    init_scale: float = 1.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch experts capacity inputs"]
    ) -> Float[Array, "batch experts capacity outputs"]:
        _, experts, _, inputs = x.shape
        dtype = jnp.dtype(self.config.dtype)
        init = kernel_init(self.config, scale=self.init_scale, batched=True)
        kernel = self.param("kernel", nn.with_logical_partitioning(init, self.axes), (experts, inputs, self.features))
        y = jnp.einsum("bxci,xio->bxco", x, kernel.astype(dtype))
        if self.config.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, (self.axes[0], self.axes[2]))
            y += self.param("bias", init, (experts, self.features)).astype(dtype)[None, :, None]
        return y


class SwitchFeedForward(nn.Module):
    """Sparse feed-forward. Tokens that find their expert full get zero here, and so pass by the residual.

    Sows into collection "experts", a value a row: ``load_balance`` and ``router_z`` times their weights (to be
    added to the loss), and ``dropped``.
    """

    config: Model

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length embed"], segments: Int[Array, "batch length"], train: bool = False
    ) -> Float[Array, "batch length embed"]:
        config, experts = self.config, self.config.experts
        routing = self._route(x, segments, train)
        dtype = jnp.dtype(config.dtype)
        names = ("batch", "experts", "capacity", None)
        slots = jnp.einsum("blxc,ble->bxce", routing.dispatch.astype(dtype), x.astype(dtype))
        slots = nn.with_logical_constraint(slots, names)
        axes = ("experts", "embed", "mlp")
        hidden = ExpertProjection(config, config.mlp_dim, axes, name="in")(slots)
        activation = ACTIVATIONS[config.activation]
        if is_gated(config):
            hidden = activation(ExpertProjection(config, config.mlp_dim, axes, name="gate")(slots)) * hidden
        else:
            hidden = activation(hidden)
        hidden = nn.Dropout(max(experts.dropout, config.mlp_dropout), deterministic=not train)(hidden)
        axes = ("experts", "mlp", "embed")
        output = ExpertProjection(config, config.embed_dim, axes, residual_scale(config), name="out")(hidden)
        output = nn.with_logical_constraint(output, names)
        return jnp.einsum("blxc,bxce->ble", routing.combine.astype(dtype), output)

    def _route(self, x, segments, train):
        """Router in float32, whatever the compute type (section 2.4)."""
        experts = self.config.experts
        x = x.astype(jnp.float32)
        if train and experts.jitter:
            noise = jax.random.uniform(self.make_rng("jitter"), x.shape, minval=-experts.jitter, maxval=experts.jitter)
            x *= 1.0 + noise
        config = dataclasses.replace(self.config, dtype="float32")
        axes = ("embed", "experts")
        logits = Projection(config, (experts.num_experts,), axes, use_bias=False, name="router")(x)
        factor = experts.capacity_factor if train else experts.eval_capacity_factor
        capacity = expert_capacity(x.shape[1], experts.num_experts, factor)
        routing = route(logits, segments, capacity)
        self._sow("load_balance", experts.load_balance_weight * routing.load_balance)
        self._sow("router_z", experts.z_loss_weight * routing.router_z)
        self._sow("dropped", routing.dropped)
        self.sow("intermediates", "dispatch", routing.dispatch)
        return routing

    def _sow(self, name, value):
        self.sow("experts", name, value, init_fn=lambda: 0.0, reduce_fn=lambda _, new: new)
