"""Scaled dot-product attention: ``softmax(Q K^T / sqrt(d_k)) V`` (Vaswani et al. 2017, equation 1).

:class:`Mask` says who may attend to whom as *structure* (segments, order, prefix) and not as a matrix, so
that a fused kernel can use it without ever holding [length, length].
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from lmx.kernels.dropout import dropout


@struct.dataclass
class Mask:
    """Who may attend to whom.

    Attributes:
      query_segments, key_segments: the document that each token belongs to; tokens attend within their own.
        0 is padding, to which nobody attends.
      query_index, key_index: place of each token in the row, the order that ``causal`` and windows go by.
      prefix: 1 for keys that all of their segment may see, however early the query (prefix LM).
      causal: a query sees no key after it.
    """

    query_segments: Int[Array, "batch query"]
    key_segments: Int[Array, "batch key"]
    query_index: Int[Array, " query"]
    key_index: Int[Array, " key"]
    prefix: Int[Array, "batch key"] | None = None
    causal: bool = struct.field(pytree_node=False, default=False)

    def allowed(self, window: int = 0) -> Bool[Array, "batch query key"]:
        """The mask as a matrix, True where the query may attend to the key.

        Args:
          window: a query sees keys less than so many places away (itself included); 0 is no limit.
        """
        allowed = (self.query_segments[:, :, None] == self.key_segments[:, None, :]) & (
            self.key_segments[:, None, :] > 0
        )
        distance = self.query_index[:, None] - self.key_index[None, :]
        if self.causal:
            past = (distance >= 0)[None]
            if self.prefix is not None:
                past = past | (self.prefix[:, None, :] > 0)
            allowed = allowed & past
        if window:
            allowed = allowed & (abs(distance) < window)[None]
        return allowed


def attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch key kv_heads head_dim"],
    value: Float[Array, "batch key kv_heads head_dim"],
    mask: Mask,
    *,
    scale: float = 1.0,
    window: int = 0,
    bias: Float[Array, "_ heads query key"] | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
) -> tuple[Float[Array, "batch query heads head_dim"], Float[Array, "batch heads query key"]]:
    """Plain attention, with grouped heads: query head h reads key/value head ``h // (heads / kv_heads)``.

    Scores and softmax are float32 whatever the inputs are. A query that may see no key gets the mean of the
    values, never NaN.

    Args:
      scale: multiplies ``Q K^T``.
      window: see :meth:`Mask.allowed`.
      bias: added to the scaled scores (T5's relative bias).
      dropout_rate, dropout_rng: dropout of the attention weights.

    Returns:
      The output and the attention weights (before dropout). Under jit, weights that nobody uses cost nothing.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = (query * jnp.asarray(scale, query.dtype)).reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores += bias.reshape(bias.shape[0], kv_heads, heads // kv_heads, *bias.shape[2:])
    allowed = mask.allowed(window)[:, None, None]
    scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    kept = weights
    if dropout_rate > 0.0:
        kept = dropout(dropout_rng, weights, dropout_rate)
    output = jnp.einsum("bkgqs,bskd->bqkgd", kept.astype(value.dtype), value)
    return output.reshape(query.shape), weights.reshape(batch, heads, length, key.shape[1])


def describe(platform: str) -> str:
    """Which form of attention runs on ``platform`` and why, for the header of a run."""
    if platform == "cpu":
        return "plain XLA (no fused kernel exists for cpu)"
    return f"plain XLA (lmx has no fused kernel for {platform} yet; long rows cost memory quadratic in length)"
