"""How order enters: sinusoids, rotations, and T5's relative buckets."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lmx.config import Model


def sinusoidal(positions: Int[Array, "batch length"], embed_dim: int) -> Float[Array, "batch length embed"]:
    """``PE(pos, 2i) = sin(pos / 10000^(2i/d))``, ``PE(pos, 2i+1) = cos(…)`` (Vaswani et al. 2017, section 3.5)."""
    frequencies = 10000.0 ** (-np.arange(0, embed_dim, 2) / embed_dim)
    angles = positions[..., None] * frequencies
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, embed_dim)


def rotate(
    x: Float[Array, "batch length heads head_dim"], positions: Int[Array, "batch length"], base: float
) -> Float[Array, "batch length heads head_dim"]:
    """Rotary positions (Su et al. 2021, equation 34): dimension i is paired with i + head_dim/2."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * base ** (-np.arange(half) / half)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def relative_bucket(
    distance: Int[Array, "query key"], num_buckets: int, max_distance: int, bidirectional: bool
) -> Int[Array, "query key"]:
    """The bucket of ``key place - query place`` (Raffel et al. 2020, section 2.1).

    Half of the buckets are one distance each; the others grow logarithmically up to ``max_distance``, beyond
    which all share the last. A bidirectional stack uses one half of them for keys after the query; a causal
    one puts all of those into bucket 0.
    """
    offset = 0
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(distance > 0, num_buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = num_buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1) / exact) / np.log(max_distance / exact)
    large = jnp.minimum(exact + (ratio * (num_buckets - exact)).astype(jnp.int32), num_buckets - 1)
    return offset + jnp.where(distance < exact, distance, large)


class RelativeBias(nn.Module):
    """One learned bias a head and bucket, shared by all layers of a stack."""

    config: Model
    bidirectional: bool

    @nn.compact
    def __call__(
        self, query_index: Int[Array, " query"], key_index: Int[Array, " key"]
    ) -> Float[Array, "1 heads query key"]:
        config = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(config.init_stddev), ("heads", None))
        table = self.param("table", init, (config.num_heads, config.relative_buckets))
        bucket = relative_bucket(
            key_index[None, :] - query_index[:, None],
            config.relative_buckets,
            config.relative_max_distance,
            self.bidirectional,
        )
        return table[None, :, bucket]
