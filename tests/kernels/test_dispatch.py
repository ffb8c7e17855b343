"""Tokens to slots and back, and their gradients, against products with the zeros and ones that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.kernels.dispatch import Places, combine, dispatch


def draw(rng, batch, length, k, num_slots):
    """Slots of random choices, some of which have none, and tokens, outputs and gates."""
    slots = np.full((batch, length * k), num_slots)
    for row in slots:
        count = rng.integers(0, min(length * k, num_slots) + 1)
        row[rng.permutation(length * k)[:count]] = rng.permutation(num_slots)[:count]
    arrays = [rng.standard_normal(shape) for shape in ((batch, length, 3), (batch, num_slots, 3), (batch, length, k))]
    return slots.reshape(batch, length, k), arrays


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    k=st.integers(1, 3),
    slots=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_they_are_products_with_the_assignment(batch, length, k, slots, seed):
    chosen, (x, output, gates) = draw(np.random.default_rng(seed), batch, length, k, slots)
    assigned = np.eye(slots + 1)[chosen][..., :slots]  # [batch, length, k, slots]

    def loss(x, output, gates):
        places = Places.of(jnp.asarray(chosen), slots)
        sent, back = dispatch(x, places), combine(output, gates, places)
        return (sent * output).sum() + (back * x).sum(), (sent, back)

    arrays = [jnp.asarray(array, jnp.float32) for array in (x, output, gates)]
    gradients, (sent, back) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    gated = np.einsum("blks,blk->bls", assigned, gates)
    np.testing.assert_allclose(sent, np.einsum("blks,ble->bse", assigned, x), atol=1e-6)
    np.testing.assert_allclose(back, np.einsum("bls,bse->ble", gated, output), atol=1e-5)
    expected = [
        np.einsum("blks,bse->ble", assigned, output) + np.einsum("bls,bse->ble", gated, output),
        np.einsum("blks,ble->bse", assigned, x) + np.einsum("bls,ble->bse", gated, x),
        np.einsum("blks,bse,ble->blk", assigned, output, x),
    ]
    for found, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
