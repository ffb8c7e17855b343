"""How order enters: sinusoids, rotations, and T5's relative buckets."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lmx.model_config import Model


def sinusoidal(positions: Int[Array, "batch length"], embed_dim: int) -> Float[Array, "batch length embed"]:
    """``PE(pos, 2i) = sin(pos / 10000^(2i/d))``, ``PE(pos, 2i+1) = cos(…)`` (Vaswani et al. 2017, section 3.5)."""
    frequencies = 10000.0 ** (-np.arange(0, embed_dim, 2) / embed_dim)
    angles = positions[..., None] * frequencies
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, embed_dim)


def rotate(
    x: Float[Array, "batch length heads head_dim"], positions: Int[Array, "batch length"], config: Model
) -> Float[Array, "batch length heads head_dim"]:
    """Rotary positions (Su et al. 2021, equation 34): of the r rotated dimensions, i is paired with i + r/2.

    With ``rotary_fraction`` below 1 the others stay as they are (GPT-NeoX: Black et al. 2022, section 2.1.1).
    """
    width = round(x.shape[-1] * config.rotary_fraction)
    frequencies, scale = rotary_frequencies(config, width, positions)
    angles = positions[..., None, None] * frequencies
    sin, cos = scale * jnp.sin(angles), scale * jnp.cos(angles)
    rotated, rest = x[..., :width], x[..., width:]
    first, second = jnp.split(rotated.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated


def rotary_frequencies(
    config: Model, width: int, positions: Int[Array, "batch length"]
) -> tuple[Float[Array, " half"] | np.ndarray, float]:
    """Radians a position for each pair of ``width`` dimensions, and the factor on sines and cosines.

    Plain: ``base^(-2i/width)``. Scaled (``config.rotary_scaling``): linear is Chen et al. 2023; dynamic raises the
    base by the length of the rows at hand (bloc97 2023, "NTK-aware"); llama3 is Llama 3.1's rule; yarn is Peng et al.
    2023, equations 17 to 22.
    """
    scaling, base = config.rotary_scaling, config.rotary_base
    exponents = np.arange(0, width, 2) / width
    plain = base**-exponents
    if scaling.kind == "none":
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    if scaling.kind == "dynamic":
        length = jnp.maximum(positions.max() + 1, scaling.original_length)
        grown = base * (scaling.factor * length / scaling.original_length - (scaling.factor - 1)) ** (
            width / (width - 2)
        )
        return grown**-exponents, 1.0
    if scaling.kind == "llama3":
        turns = scaling.original_length * plain / (2 * np.pi)  # of each pair over the original length
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return kept * plain + (1 - kept) * plain / scaling.factor, 1.0

    def dimension(turns: float) -> float:
        """The pair that turns so many times over the original length."""
        return width * np.log(scaling.original_length / (turns * 2 * np.pi)) / (2 * np.log(base))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    divided = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return (1 - divided) * plain + divided * plain / scaling.factor, factor


def relative_bucket(
    distances: Int[Array, "..."], num_buckets: int, max_distance: int, bidirectional: bool
) -> Int[Array, "..."]:
    """The bucket of each ``key place - query place`` (Raffel et al. 2020, section 2.1).

    Half of the buckets are one distance each; the others grow logarithmically up to ``max_distance``, beyond
    which all share the last. A bidirectional stack uses one half of them for keys after the query; a causal
    one puts all of those into bucket 0.
    """
    offset = 0
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(distances > 0, num_buckets, 0)
        distances = jnp.abs(distances)
    else:
        distances = jnp.maximum(-distances, 0)
    exact = num_buckets // 2
    ratio = jnp.log(jnp.maximum(distances, 1) / exact) / np.log(max_distance / exact)
    large = jnp.minimum(exact + (ratio * (num_buckets - exact)).astype(jnp.int32), num_buckets - 1)
    return offset + jnp.where(distances < exact, distances, large)


class RelativeBias(nn.Module):
    """One learned bias a head and bucket, shared by all layers of a stack."""

    config: Model
    bidirectional: bool

    @nn.compact
    def __call__(self, distances: Int[Array, " distances"]) -> Float[Array, "heads distances"]:
        config = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(config.init_stddev), ("heads", None))
        table = self.param("table", init, (config.num_heads, config.relative_buckets))
        buckets = config.relative_buckets, config.relative_max_distance
        return table[:, relative_bucket(distances, *buckets, self.bidirectional)]
