"""What stands on top of the stacks: language modelling, masked language modelling, classes and spans."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmx.config import Model
from lmx.models.feed_forward import ACTIVATIONS
from lmx.models.layers import Norm, Projection


class VocabularyLogits(nn.Module):
    """Scores of every token: the transposed token table, or a kernel of its own."""

    config: Model
    use_bias: bool = False

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "... embed"], table: Float[Array, "vocab embed"]
    ) -> Float[Array, "... vocab"]:
        config = self.config
        if config.scale_logits:
            hidden = hidden / math.sqrt(config.embed_dim)
        if config.tie_embeddings:
            logits = jnp.einsum("...e,ve->...v", hidden, table)
        else:
            logits = Projection(config, (config.vocab_size,), ("embed", "vocab"), use_bias=False, name="output")(hidden)
        logits = logits.astype(jnp.float32)
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
            logits += self.param("bias", init, (config.vocab_size,))
        return nn.with_logical_constraint(logits, ("batch", "length", "vocab")) if logits.ndim == 3 else logits


class MaskedLMHead(nn.Module):
    """Dense, activation, norm, then the vocabulary with a bias (BERT's code, ``cls/predictions``)."""

    config: Model

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "... embed"], table: Float[Array, "vocab embed"]
    ) -> Float[Array, "... vocab"]:
        config = self.config
        hidden = Projection(config, (config.embed_dim,), ("embed", "mlp"), name="dense")(hidden)
        hidden = Norm(config, name="norm")(ACTIVATIONS["gelu"](hidden))
        return VocabularyLogits(config, use_bias=True, name="vocabulary")(hidden, table)


class ClassificationHead(nn.Module):
    """A pooled vector, dense, tanh, then the classes (Devlin et al. 2019, section 3 and its code's pooler).

    The vector is the row's first token, or the mean over its tokens; packed rows are not for classification.
    """

    config: Model

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "batch length embed"], segments: Int[Array, "batch length"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        config = self.config
        if config.pooling == "first":
            pooled = hidden[:, 0]
        else:
            real = (segments > 0).astype(hidden.dtype)[..., None]
            pooled = (hidden * real).sum(1) / jnp.maximum(real.sum(1), 1)
        pooled = jnp.tanh(Projection(config, (config.embed_dim,), ("embed", "mlp"), name="dense")(pooled))
        pooled = nn.Dropout(config.head_dropout, deterministic=not train)(pooled)
        logits = Projection(config, (config.num_classes,), ("embed", None), name="output")(pooled)
        return logits.astype(jnp.float32)


class Heads(nn.Module):
    """The heads that ``config.heads`` names. Their parameters stand apart from the body's, so that fine-tuning
    can replace or train them alone."""

    config: Model

    def setup(self):
        config = self.config
        makers = {
            "lm": lambda: VocabularyLogits(config),
            "mlm": lambda: MaskedLMHead(config),
            "classification": lambda: ClassificationHead(config),
            "span": lambda: Projection(config, (2,), ("embed", None)),
        }
        for name in config.heads:
            setattr(self, name, makers[name]())


def span_scores(
    logits: Float[Array, "batch length 2"], segments: Int[Array, "batch length"]
) -> Float[Array, "batch length 2"]:
    """Start and end scores (Devlin et al. 2019, section 4.2) with padding out of reach."""
    return jnp.where(segments[..., None] > 0, logits.astype(jnp.float32), jnp.finfo(jnp.float32).min)


def num_params(params) -> int:
    """Parameters in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
