"""What stands on top of the stacks: language modelling, masked language modelling, classes and spans."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmx.kernels.int8 import Quantized
from lmx.kernels.linear_cross_entropy import Unembedding
from lmx.kernels.products import Turned
from lmx.model_config import Model
from lmx.models.feed_forward import activate
from lmx.models.layers import Dropout, Norm, Projection, UnembeddingKernel


class VocabularyHead(nn.Module):
    """Scores of every token, by the transposed token table or a kernel of its own."""

    config: Model
    use_bias: bool = False

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "... embed"], table: Float[Array, "vocab embed"] | Quantized
    ) -> Unembedding:
        config = self.config
        if config.scale_logits:
            hidden = hidden / math.sqrt(config.embed_dim)
        kernel, tied = table, config.tie_embeddings
        if not tied:
            kernel = UnembeddingKernel(config, name="output")()
        if isinstance(kernel, Turned):
            kernel, tied = kernel.kernel, True
        bias = None
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
            bias = self.param("bias", init, (config.vocab_size,))
        return Unembedding(hidden.astype(config.dtype), kernel, bias, tied)


class MaskedLMHead(nn.Module):
    """Dense, the feed-forward's activation, norm, then the vocabulary with a bias (BERT's code, ``cls/predictions``).

    Where the feed-forward is gated, its activation without the gate.
    """

    config: Model

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "... embed"], table: Float[Array, "vocab embed"] | Quantized
    ) -> Unembedding:
        config = self.config
        hidden = Projection(config, (config.embed_dim,), ("embed", "head_mlp"), name="dense")(hidden)
        hidden = Norm(config, name="norm")(activate(config, hidden))
        return VocabularyHead(config, use_bias=True, name="vocabulary")(hidden, table)


def pool(
    hidden: Float[Array, "batch length embed"], segments: Int[Array, "batch length"], how: str
) -> Float[Array, "batch embed"]:
    """The first or last token's state, or the mean over the tokens of each row; padding may stand on either side.

    Packed rows are not for pooling.
    """
    real = segments > 0
    if how == "mean":
        weights = real.astype(hidden.dtype)[..., None]
        return (hidden * weights).sum(1) / jnp.maximum(weights.sum(1), 1)
    place = jnp.argmax(real, axis=1) if how == "first" else real.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]


class Pooler(nn.Module):
    """One vector a row: pooled, then dense and its activation (BERT's code, ``pooler``)."""

    config: Model

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "batch length embed"], segments: Int[Array, "batch length"]
    ) -> Float[Array, "batch embed"]:
        config = self.config
        pooled = pool(hidden, segments, config.pooling)
        if config.pooler == "none":
            return pooled
        activation = {"tanh": jnp.tanh, "relu": jax.nn.relu}[config.pooler]
        return activation(Projection(config, (config.embed_dim,), ("embed", "head_mlp"), name="dense")(pooled))


class ClassificationHead(nn.Module):
    """The pooled vector, then the classes (Devlin et al. 2019, section 4.1)."""

    config: Model

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "batch length embed"], segments: Int[Array, "batch length"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        config = self.config
        pooled = Pooler(config, name="pooler")(hidden, segments)
        pooled = Dropout(config.head_dropout)(pooled, train)
        bias = config.pooler != "none"  # GPT-2's score has none
        logits = Projection(config, (config.num_classes,), ("embed", None), use_bias=bias, name="output")(pooled)
        return logits.astype(jnp.float32)


class Heads(nn.Module):
    """The heads that ``config.heads`` names. Their parameters stand apart from the body's, so that fine-tuning
    can replace or train them alone."""

    config: Model

    def setup(self):
        config = dataclasses.replace(self.config, products="dtype")  # what is small is not rounded
        makers = {
            "lm": lambda: VocabularyHead(config),
            "mlm": lambda: MaskedLMHead(config),
            "classification": lambda: ClassificationHead(config),
            "span": lambda: Projection(config, (2,), ("embed", None), use_bias=True),
            "pooler": lambda: Pooler(config),
        }
        for name in config.heads:
            setattr(self, name, makers[name]())


def span_scores(
    logits: Float[Array, "batch length 2"], segments: Int[Array, "batch length"]
) -> Float[Array, "batch length 2"]:
    """Start and end scores (Devlin et al. 2019, section 4.2) with padding out of reach."""
    return jnp.where(segments[..., None] > 0, logits.astype(jnp.float32), jnp.finfo(jnp.float32).min)


def num_params(params) -> int:
    """Parameters in a tree of arrays or shapes; of quantized ones not their scales."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantized))
    return sum(math.prod(leaf.shape) for leaf in leaves)
