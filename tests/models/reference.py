"""The textbook's formulas in plain numpy, with a loop wherever a formula has an index: slow, and hard to get wrong.

Also the small models that the tests of this folder share. Parameters are drawn anew (:func:`randomized`), since
biases of zero and scales of one would hide a mistake.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmx.config import Model
from lmx.models.transformer import Transformer

SMALL = {
    "vocab_size": 19,
    "num_layers": 2,
    "embed_dim": 8,
    "num_heads": 2,
    "mlp_dim": 12,
    "max_length": 16,
    "scan_layers": False,
}


def small(architecture: str = "decoder", **fields) -> Model:
    """A tiny model config, unrolled unless said otherwise."""
    return Model(**{**SMALL, "architecture": architecture, **fields})


def tokens(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(1, SMALL["vocab_size"], shape), jnp.int32)


def example(config: Model, batch: int = 2, length: int = 6) -> dict[str, jax.Array]:
    """A batch of random tokens for any architecture."""
    if config.architecture == "encoder_decoder":
        return {"encoder_tokens": tokens((batch, length)), "decoder_tokens": tokens((batch, length - 1), 1)}
    return {"tokens": tokens((batch, length))}


def randomized(params, seed: int = 0):
    """Every leaf drawn from N(0, 0.3²), norm scales around 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = 0.3 * rng.standard_normal(leaf.shape)
        return jnp.asarray(noise + (path[-1].key == "scale"), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, params)


def build(config: Model, seed: int = 0, batch: dict | None = None):
    """The model and parameters drawn anew, without axis names."""
    model = Transformer(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch or example(config))
    return model, randomized(nn.meta.unbox(shapes["params"]), seed)


def as_numpy(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def layer_norm(x, params, epsilon=1e-5):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * params["scale"] + params.get("bias", 0.0)


def rms_norm(x, params, epsilon=1e-5):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * params["scale"]


def softmax(scores):
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def relu(x):
    return np.maximum(x, 0)


def multi_head(x, context, params, allowed):
    """``Concat(head_1 … head_h) W_O``, ``head_i = softmax(Q_i K_i^T / sqrt(d_k)) V_i``, one head after the other.

    x [length, embed], context [source, embed], allowed [length, source] of bools.
    """
    heads, head_dim = params["query"]["bias"].shape
    outputs = []
    for head in range(heads):
        query, key, value = (
            source @ params[name]["kernel"][:, head] + params[name]["bias"][head]
            for name, source in (("query", x), ("key", context), ("value", context))
        )
        scores = query @ key.T / math.sqrt(head_dim)
        outputs.append(softmax(np.where(allowed, scores, -np.inf)) @ value)
    concatenated = np.concatenate(outputs, axis=-1)
    return concatenated @ params["out"]["kernel"].reshape(heads * head_dim, -1) + params["out"]["bias"]


def feed_forward(x, params, activation=gelu):
    hidden = activation(x @ params["in"]["kernel"] + params["in"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def post_norm_layer(x, params, allowed, activation=gelu):
    """``H = LayerNorm(H + SelfAttention(H))``; ``H = LayerNorm(H + FFN(H))``."""
    x = layer_norm(x + multi_head(x, x, params["attention"], allowed), params["attention_norm"])
    return layer_norm(x + feed_forward(x, params["mlp"], activation), params["mlp_norm"])


def pre_norm_layer(x, params, allowed, activation=gelu):
    """``H = H + SelfAttention(LayerNorm(H))``; ``H = H + FFN(LayerNorm(H))``."""
    h = layer_norm(x, params["attention_norm"])
    x = x + multi_head(h, h, params["attention"], allowed)
    return x + feed_forward(layer_norm(x, params["mlp_norm"]), params["mlp"], activation)


def allowed_loop(length, *, segments=None, causal=False, prefix=None, window=0):
    """Who may see whom, pair by pair."""
    matrix = np.zeros((length, length), bool)
    for query in range(length):
        for key in range(length):
            same = segments is None or (segments[query] == segments[key] and segments[key] != 0)
            visible = not causal or key <= query or (prefix is not None and prefix[key] == 1)
            near = window == 0 or abs(query - key) < window
            matrix[query, key] = same and visible and near
    return matrix
