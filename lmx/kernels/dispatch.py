"""Tokens to the slots of their experts and back, by their places: rows are read, and nothing is multiplied by zeros.

A slot holds one token at most, and a token knows its slots; so the gradient of either way reads rows as well, where
that of an indexed read would add into them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmx.parallel.sharding import on_each_devices_rows


class Places(NamedTuple):
    """Which choice is in which slot. Choices of a row are numbered token by token: k for the first token, k for ….

    Attributes:
      slot_of_choice: the slot of each token's choice; the number of slots where it has none.
      choice_of_slot: the choice that is in a slot; the number of choices where it is empty.
    """

    slot_of_choice: Int[Array, "batch length k"]
    choice_of_slot: Int[Array, "batch slots"]

    @classmethod
    def of(cls, slot_of_choice: Int[Array, "batch length k"], num_slots: int) -> "Places":
        """From the slot of each choice, which is ``num_slots`` where it has none, and otherwise its alone."""

        def row(slots):
            choices = jnp.arange(slots.size)
            return jnp.full(num_slots + 1, slots.size).at[slots.reshape(-1)].set(choices)[:num_slots]

        return cls(slot_of_choice, on_each_devices_rows(jax.vmap(row), slot_of_choice))


def dispatch(x: Float[Array, "batch length embed"], places: Places) -> Float[Array, "batch slots embed"]:
    """What is in each slot: its token, or zeros."""
    return _dispatch(x, places)


def combine(
    output: Float[Array, "batch slots embed"], gates: Float[Array, "batch length k"], places: Places
) -> Float[Array, "batch length embed"]:
    """Each token's sum over its choices of their gate times what is in their slot; zeros where none has one."""
    return _combine(output, gates, places)


def _rows(x: Array, index: Array) -> Array:
    """``x[index]`` of each row of the batch, and zeros where the index is one beyond.

    Split by hand: the compiler's own way of splitting an indexed read aborts within a pipeline (jax 0.10.2).
    """

    def row(x, index):
        taken = x.at[index].get(mode="clip")
        return jnp.where((index < x.shape[0])[..., None], taken, 0)

    return on_each_devices_rows(jax.vmap(row), x, index)


def _token_of_slot(places: Places) -> Array:
    return places.choice_of_slot // places.slot_of_choice.shape[2]


@jax.custom_vjp
def _dispatch(x, places):
    return _rows(x, _token_of_slot(places))


_dispatch.defvjp(
    lambda x, places: (_dispatch(x, places), places),
    lambda places, gradient: (_rows(gradient, places.slot_of_choice).sum(2), None),
)


@jax.custom_vjp
def _combine(output, gates, places):
    return jnp.einsum("blk,blke->ble", gates, _rows(output, places.slot_of_choice))


def _combine_backward(residuals, gradient):
    output, gates, places = residuals
    of_gates = jnp.einsum("ble,blke->blk", gradient, _rows(output, places.slot_of_choice))
    gate_of_slot = _rows(gates.reshape(gates.shape[0], -1, 1), places.choice_of_slot)
    return _rows(gradient, _token_of_slot(places)) * gate_of_slot, of_gates, None


_combine.defvjp(
    lambda output, gates, places: (_combine(output, gates, places), (output, gates, places)), _combine_backward
)
