"""Softmax cross-entropy a token, with label smoothing and z-loss.

The loss of one token with logits :math:`x`, target :math:`t`, vocabulary :math:`V`, smoothing
:math:`\\epsilon` and z-loss weight :math:`\\zeta` is

.. math:: \\log Z - (1 - \\epsilon)\\, x_t - \\frac{\\epsilon}{|V|} \\sum_v x_v + \\zeta \\log^2 Z,
          \\qquad Z = \\sum_v e^{x_v}.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmx.parallel.sharding import current_layout, current_platform

EQUAL = 1e-6  # part of their sum by which probabilities may differ and still count as equal


def cross_entropy(
    logits: Float[Array, "*batch vocab"],
    targets: Int[Array, "*batch"],
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Array, "*batch"]:
    """The cross-entropy of each token in nats, in float32 whatever the type of the logits.

    Args:
      logits: unnormalized log-probabilities.
      targets: the right ids, in ``[0, vocab)``.
      label_smoothing: probability spread evenly over the whole vocabulary, the target included
        (Szegedy et al. 2016, section 7).
      z_loss: weight of the squared log of the softmax's normalizer, which keeps it near 0
        (PaLM, Chowdhery et al. 2022, section 5).
    """
    return _cross_entropy(label_smoothing, z_loss, logits, targets)


def scores(
    logits: Float[Array, "*batch vocab"],
    targets: Int[Array, "*batch"],
    label_smoothing: float,
    z_loss: float,
    vocab_size: int,
) -> tuple[Float[Array, "*batch"], Bool[Array, "*batch"]]:
    """:func:`cross_entropy`, and whether no id is likelier than the target, and not all are equally likely.

    Which is cheaper to tell than which id is the likeliest: nothing is written for each logit. From ``vocab_size`` on,
    logits are of no id and may be anything.
    """
    return _scored(label_smoothing, z_loss, logits, targets, vocab_size)[:2]


def scores_and_gradient(
    logits: Float[Array, "*batch vocab"],
    targets: Int[Array, "*batch"],
    weights: Float[Array, "*batch"],
    label_smoothing: float,
    z_loss: float,
    vocab_size: int,
) -> tuple[Float[Array, "*batch"], Bool[Array, "*batch"], Float[Array, "*batch vocab"]]:
    """:func:`scores`, and the gradient by the logits, in float32, of the sum of the losses with these weights."""
    loss, right, softmax = _scored(label_smoothing, z_loss, logits, targets, vocab_size)
    return loss, right, _gradient(label_smoothing, z_loss, softmax, targets, weights, vocab_size)


class _Softmax(NamedTuple):
    """``exp(logits - top)``, their sums, and the logarithms of what the sums would be without ``top``."""

    exponentials: Float[Array, "*batch vocab"]
    total: Float[Array, "*batch"]
    log_total: Float[Array, "*batch"]


def _scored(label_smoothing, z_loss, logits, targets, vocab_size):
    logits = _of_ids(logits.astype(jnp.float32), vocab_size, jnp.finfo(jnp.float32).min)
    # The loss is the same when all logits move together; near 0 nothing overflows and differences keep their digits.
    if current_platform() == "gpu" and not vocab_is_split():
        top, total = _top_and_total(logits)
        exponentials = jnp.exp(logits - top[..., None])
    else:
        # The barrier keeps a compiler for CPUs from writing the largest out again for each logit.
        top = jax.lax.optimization_barrier(jnp.max(logits, axis=-1))
        exponentials = jnp.exp(logits - top[..., None])
        total = jnp.sum(exponentials, axis=-1)
    log_sum = jnp.log(total)
    at_target = _logit_of(logits, targets)
    loss = log_sum - (1 - label_smoothing) * (at_target - top)
    if label_smoothing:
        loss -= label_smoothing / vocab_size * jnp.sum(_of_ids(logits - top[..., None], vocab_size), axis=-1)
    if z_loss:
        loss += z_loss * jnp.square(log_sum + top)
    right = (at_target >= top) & (total < (1 - EQUAL) * vocab_size)
    return loss, right, _Softmax(exponentials, total, log_sum + top)


def _of_ids(x, vocab_size, otherwise=0.0):
    """``x``, and something else where there is no id."""
    if x.shape[-1] == vocab_size:
        return x
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) < vocab_size, x, otherwise)


def _top_and_total(logits):
    """The largest logit and the sum of ``exp(logits - top)``, of one pass over them (Milakov & Gimelshein 2018)."""

    def join(one, other):
        (top, total), (other_top, other_total) = one, other
        new = jnp.maximum(top, other_top)
        return new, total * jnp.exp(top - new) + other_total * jnp.exp(other_top - new)

    least = jnp.array(jnp.finfo(logits.dtype).min)  # not infinite, whose difference from itself is no number
    start = (least, jnp.zeros((), logits.dtype))
    return jax.lax.reduce((logits, jnp.ones_like(logits)), start, join, (logits.ndim - 1,))


def vocab_is_split() -> bool:
    """Whether a device has the logits of a part of the vocabulary alone."""
    layout = current_layout()
    return layout is not None and layout.devices_along(layout.axes("vocab")) > 1


def _logit_of(logits, targets):
    if not vocab_is_split():
        return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    # A comparison instead of a gather: it partitions over a split vocabulary.
    return jnp.sum(jnp.where(_is_target(logits, targets), logits, 0), axis=-1)


def _is_target(logits, targets):
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]


def _gradient(label_smoothing, z_loss, softmax, targets, weights, vocab_size):
    exponentials, total, log_total = softmax
    factor = (weights * (1 + 2 * z_loss * log_total) / total)[..., None]
    at_target = jnp.where(_is_target(exponentials, targets), (1 - label_smoothing) * weights[..., None], 0)
    gradient = exponentials * factor - at_target
    if label_smoothing:
        gradient = _of_ids(gradient - label_smoothing / vocab_size * weights[..., None], vocab_size)
    return gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(label_smoothing, z_loss, logits, targets):
    return _scored(label_smoothing, z_loss, logits, targets, logits.shape[-1])[0]


def _forward(label_smoothing, z_loss, logits, targets):
    loss, _, softmax = _scored(label_smoothing, z_loss, logits, targets, logits.shape[-1])
    return loss, (softmax, targets, jnp.zeros((), logits.dtype))


def _backward(label_smoothing, z_loss, residuals, weights):
    softmax, targets, like = residuals
    vocab_size = softmax.exponentials.shape[-1]
    return _gradient(label_smoothing, z_loss, softmax, targets, weights, vocab_size).astype(like.dtype), None


_cross_entropy.defvjp(_forward, _backward)


def cross_entropy_reference(
    logits: Float[Array, "*batch vocab"],
    targets: Int[Array, "*batch"],
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Array, "*batch"]:
    """The same by definition: the expectation of ``-log p`` under the smoothed target distribution."""
    logits = logits.astype(jnp.float32)
    vocab = logits.shape[-1]
    wanted = (1 - label_smoothing) * jax.nn.one_hot(targets, vocab) + label_smoothing / vocab
    log_z = jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
    return -jnp.sum(wanted * (logits - log_z[..., None]), axis=-1) + z_loss * log_z**2
