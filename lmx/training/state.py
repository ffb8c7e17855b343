"""What training changes. Beside the position in the data, nothing else needs saving."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Int


@struct.dataclass
class TrainState:
    """A pytree.

    Attributes:
      step: optimizer steps done.
      params: the model's parameters, a plain pytree.
      opt_state: whatever the optimizer keeps.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def step_rngs(seed: int, step: Int[Array, ""], microbatch: int | Int[Array, ""] = 0) -> dict[str, jax.Array]:
    """The device's randomness: a function of the seed, the step and the micro-batch, so that nothing is saved."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), microbatch)
    dropout, jitter = jax.random.split(key)
    return {"dropout": dropout, "jitter": jitter}
