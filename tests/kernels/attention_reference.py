"""Attention and its gradients by their formulas, in float64 and with every weight there at once."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from lmx.kernels.attention import Mask
from tests.models.reference import softmax


@dataclasses.dataclass
class Problem:
    """One attention, and the gradient of a loss by its output."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    mask: Mask
    scale: float
    window: int
    bias: np.ndarray | None
    gradient: np.ndarray

    def arrays(self, dtype=jnp.float32):
        """Query, key, value and bias for JAX."""
        bias = None if self.bias is None else jnp.asarray(self.bias, jnp.float32)
        return *(jnp.asarray(x, dtype) for x in (self.query, self.key, self.value)), bias

    def rounded(self, dtype) -> "Problem":
        """The problem whose query, key and value are these after rounding to ``dtype``."""
        query, key, value = (np.float64(jnp.asarray(x, dtype)) for x in (self.query, self.key, self.value))
        return dataclasses.replace(self, query=query, key=key, value=value)


def draw(
    rng, *, batch=2, queries=24, keys=None, kv_heads=2, groups=2, head_dim=8, causal=False, prefix=False, window=0,
    bias=False, whole=False,
) -> Problem:  # fmt: skip
    """A problem of random values. Keys are the queries' own row unless their number is said; segments are of random
    lengths, some of them padding. Queries that see no key have no part in the loss."""
    cross = keys is not None
    keys, heads = keys or queries, kv_heads * groups
    segments = np.sort(rng.integers(1, 4, (batch, queries)), axis=1) * (rng.random((batch, 1)) < 0.8)
    segments[0, queries - queries // 6 :] = 0
    key_segments = np.sort(rng.integers(0, 4, (batch, keys)), axis=1) if cross else segments
    if whole:
        segments, key_segments = np.ones((batch, queries), int), np.ones((batch, keys), int)
    mask = Mask(
        jnp.asarray(segments, jnp.int32),
        jnp.asarray(key_segments, jnp.int32),
        prefix=jnp.asarray(rng.integers(0, 2, (batch, keys)), jnp.int32) if prefix else None,
        causal=causal,
        whole=whole,
    )
    seen = np.asarray(mask.allowed(window)).any(-1)[:, :, None, None]
    return Problem(
        rng.standard_normal((batch, queries, heads, head_dim)),
        rng.standard_normal((batch, keys, kv_heads, head_dim)),
        rng.standard_normal((batch, keys, kv_heads, head_dim)),
        mask,
        rng.uniform(0.1, 0.5),
        window,
        rng.standard_normal((heads, queries + keys - 1)) if bias else None,
        rng.standard_normal((batch, queries, heads, head_dim)) * seen,
    )


def by_formula(problem: Problem, dropped=None):
    """The output where a query sees a key and zero elsewhere, and the gradients by query, key, value and bias.

    Args:
      dropped: what dropout multiplies each weight by, [batch, heads, query, key].
    """
    batch, queries, heads, _ = problem.query.shape
    keys, kv_heads = problem.key.shape[1:3]
    key, value = (np.repeat(x, heads // kv_heads, axis=2) for x in (problem.key, problem.value))
    scores = problem.scale * np.einsum("bqhd,bshd->bhqs", problem.query, key)
    distance = np.arange(keys)[None, :] - np.arange(queries)[:, None] + queries - 1
    if problem.bias is not None:
        scores = scores + problem.bias[:, distance]
    allowed = np.broadcast_to(np.asarray(problem.mask.allowed(problem.window))[:, None], scores.shape)
    weights = softmax(np.where(allowed, scores, -1e30)) * allowed
    factor = np.ones_like(weights) if dropped is None else dropped
    output = np.einsum("bhqs,bshd->bqhd", factor * weights, value)
    of_weights = factor * np.einsum("bqhd,bshd->bhqs", problem.gradient, value)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True))
    grouped = (batch, keys, kv_heads, heads // kv_heads, -1)
    of_key = problem.scale * np.einsum("bhqs,bqhd->bshd", of_scores, problem.query)
    of_value = np.einsum("bhqs,bqhd->bshd", factor * weights, problem.gradient)
    gradients = [
        problem.scale * np.einsum("bhqs,bshd->bqhd", of_scores, key),
        of_key.reshape(grouped).sum(3),
        of_value.reshape(grouped).sum(3),
    ]
    if problem.bias is not None:
        of_bias = np.zeros_like(problem.bias)
        np.add.at(of_bias, (slice(None), distance), of_scores.sum(0))
        gradients.append(of_bias)
    return output, gradients
