"""Softmax cross-entropy a token, with label smoothing and z-loss.

The loss of one token with logits :math:`x`, target :math:`t`, vocabulary :math:`V`, smoothing
:math:`\\epsilon` and z-loss weight :math:`\\zeta` is

.. math:: \\log Z - (1 - \\epsilon)\\, x_t - \\frac{\\epsilon}{|V|} \\sum_v x_v + \\zeta \\log^2 Z,
          \\qquad Z = \\sum_v e^{x_v}.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
    logits = logits.astype(jnp.float32)
    # The loss is the same when all logits move together; near 0 nothing overflows and differences keep their digits.
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    logits = logits - top[..., None]
    log_sum = jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
    # A comparison instead of a gather: it partitions over a split vocabulary, and its gradient needs no scatter.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    loss = log_sum - (1 - label_smoothing) * jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    if label_smoothing:
        loss -= label_smoothing * jnp.mean(logits, axis=-1)
    if z_loss:
        loss += z_loss * jnp.square(log_sum + top)
    return loss


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
