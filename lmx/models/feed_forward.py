"""The position-wise feed-forward network, plain and gated."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmx.model_config import Model
from lmx.models.layers import Dropout, Projection, recomputed, residual_scale
from lmx.parallel.sharding import constrain


def gelu(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """``x`` times the probability of a smaller standard normal number (Hendrycks & Gimpel 2016, section 2).

    By ``erf`` in float32: ``erfc``, which ``jax.nn.gelu`` takes for the digits of the smallest results, is more work.
    """
    half = 0.5 * x.astype(jnp.float32)
    return (half * (1 + jax.lax.erf(half * math.sqrt(2)))).astype(x.dtype)


@jax.custom_vjp
def relu(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """``max(x, 0)``, whose gradient at 0 is 0. Backward goes by the result, which the next product keeps as well."""
    return jnp.maximum(x, 0)


relu.defvjp(lambda x: (y := jnp.maximum(x, 0), y), lambda y, gradient: (jnp.where(y > 0, gradient, 0),))

ACTIVATIONS = {
    "relu": relu,
    "gelu": gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "geglu": functools.partial(jax.nn.gelu, approximate=True),
    "swiglu": jax.nn.silu,
}


def is_gated(config: Model) -> bool:
    """Whether the hidden layer is ``activation(x W_gate) * (x W_in)`` (Shazeer 2020, equations 5 and 6)."""
    return config.activation in ("geglu", "swiglu")


def activate(
    config: Model, hidden: Float[Array, "*batch mlp"], gate: Float[Array, "*batch mlp"] | None = None
) -> Float[Array, "*batch mlp"]:
    """``activation(hidden)``, or ``activation(gate) * hidden`` where there is a gate."""
    activation = ACTIVATIONS[config.activation]
    if gate is None:
        return activation(hidden) if activation is relu else recomputed(activation)(hidden)
    return recomputed(lambda gate, hidden: activation(gate) * hidden)(gate, hidden)


class FeedForward(nn.Module):
    """``activation(x W_in + b) W_out + b`` (Vaswani et al. 2017, equation 2), or gated (Shazeer 2020)."""

    config: Model

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length embed"], train: bool = False
    ) -> Float[Array, "batch length embed"]:
        config = self.config
        axes, bias = ("embed", "mlp"), config.mlp_bias
        hidden = Projection(config, (config.mlp_dim,), axes, use_bias=bias, name="in")(x)
        gate = None
        if is_gated(config):
            gate = Projection(config, (config.mlp_dim,), axes, use_bias=bias, name="gate")(x)
        hidden = activate(config, hidden, gate)
        hidden = constrain(hidden, "batch", "length", "mlp")
        hidden = Dropout(config.mlp_dropout)(hidden, train)
        scale = residual_scale(config)
        out = Projection(config, (config.embed_dim,), ("mlp", "embed"), init_scale=scale, use_bias=bias, name="out")
        return out(hidden)
