"""The one Transformer. BERT, GPT-2, GPT-3, T5 and Switch Transformer are settings of its config.

A batch is a flat dict of int32 arrays [batch, length]: ``tokens``, and where they say something ``segments``
(documents of a packed row; 0 is padding), ``positions``, ``token_types`` and ``prefix``. With two stacks the
names are prefixed ``encoder_`` and ``decoder_``.
"""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from lmx.errors import ConfigError
from lmx.kernels.attention import Mask
from lmx.kernels.linear_cross_entropy import Unembedding
from lmx.model_config import Model
from lmx.models.attention import Cache
from lmx.models.block import Context
from lmx.models.heads import Heads, span_scores
from lmx.models.layers import Dropout, Norm, Table
from lmx.models.positions import sinusoidal
from lmx.models.stack import Stack
from lmx.parallel.sharding import constrain

Batch = Mapping[str, Array]


class Embeddings(nn.Module):
    """Token vectors, plus positions and token types where the config has them; shared by both stacks."""

    config: Model

    def setup(self):
        config = self.config
        self.tokens = Table(config, config.vocab_size, "vocab")
        if config.position == "learned":
            self.positions = Table(config, config.max_length + config.position_offset, "positions")
        if config.num_token_types:
            self.token_types = Table(config, config.num_token_types)
        if config.embedding_norm:
            self.norm = Norm(config)
        self.dropout = Dropout(config.dropout)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        token_types: Int[Array, "batch length"] | None,
        train: bool,
    ) -> Float[Array, "batch length embed"]:
        config = self.config
        x = self.tokens()[tokens].astype(config.dtype)
        if config.scale_embeddings:
            x = x * math.sqrt(config.embed_dim)
        if config.position == "learned":
            x = x + self.positions()[positions + config.position_offset].astype(x.dtype)
        elif config.position == "sinusoidal":
            x = x + sinusoidal(positions, config.embed_dim).astype(x.dtype)
        if config.num_token_types:
            types = jnp.zeros_like(tokens) if token_types is None else token_types
            x = x + self.token_types()[types].astype(x.dtype)
        if config.embedding_norm:
            x = self.norm(x)
        x = constrain(x, "batch", "residual_length", None)
        return self.dropout(x, train)


class Transformer(nn.Module):
    """Encoder, decoder, or both, with heads. See :class:`lmx.model_config.Model` for what each setting means."""

    config: Model

    def setup(self):
        config = self.config
        self.embeddings = Embeddings(config)
        if config.architecture != "decoder":
            self.encoder = Stack(config, config.num_layers)
        if config.architecture != "encoder":
            two = config.architecture == "encoder_decoder"
            layers = (config.num_decoder_layers if two else None) or config.num_layers
            self.decoder = Stack(config, layers, cross=two, causal=True)
        self.heads = Heads(config)

    def __call__(self, batch: Batch, train: bool = False) -> dict[str, Array]:
        """Every output by name: ``hidden`` and ``NAME_logits`` of each head. What is not used costs nothing
        under jit, and all parameters are made by initializing through here."""
        hidden = self.hidden(batch, train)
        outputs = {"hidden": hidden}
        if "lm" in self.config.heads:
            outputs["lm_logits"] = self.lm_logits(hidden)
        if "mlm" in self.config.heads:
            outputs["mlm_logits"] = self.mlm_logits(hidden)
        if "pooler" in self.config.heads:
            outputs["pooled"] = self.heads.pooler(hidden, _segments(batch, self._last_prefix()))
        if "classification" in self.config.heads:
            outputs["classification_logits"] = self.classify(hidden, batch, train)
        if "span" in self.config.heads:
            outputs["span_logits"] = self.span_logits(hidden, batch)
        return outputs

    def hidden(
        self, batch: Batch, train: bool = False, cache: Cache | None = None
    ) -> Float[Array, "batch length embed"]:
        """The last stack's output.

        Args:
          batch: see the module's docstring.
          train: whether dropout and jitter act; needs rngs "dropout" and "jitter" where the config has them.
          cache: decoding state; ``batch`` then holds the tokens from ``cache.index`` on, with their positions.
        """
        if self.config.architecture == "encoder_decoder":
            return self.decode(batch, self.encode(batch, train), train, cache)
        if self.config.architecture == "decoder":
            return self._run(self.decoder, batch, "", train, cache=cache)
        return self._run(self.encoder, batch, "", train)

    def encode(self, batch: Batch, train: bool = False) -> Float[Array, "batch source embed"]:
        """The encoder's output for an encoder-decoder's batch."""
        return self._run(self.encoder, batch, "encoder_", train)

    def decode(
        self, batch: Batch, encoded: Float[Array, "batch source embed"], train: bool = False, cache: Cache | None = None
    ) -> Float[Array, "batch length embed"]:
        """The decoder's output, given the encoder's. Of ``batch``, the encoder's tokens are used only for what is
        padding; segments of decoder and encoder correspond."""
        return self._run(self.decoder, batch, "decoder_", train, encoded, cache)

    def lm_head(self, hidden: Float[Array, "... embed"]) -> Unembedding:
        """What scores the next token: its logits, or a loss that never holds them all."""
        return self.heads.lm(hidden, self.embeddings.tokens())

    def mlm_head(self, hidden: Float[Array, "... embed"]) -> Unembedding:
        """What scores the token at each place; give it only the places that are asked for."""
        return self.heads.mlm(hidden, self.embeddings.tokens())

    def lm_logits(self, hidden: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """Scores of the next token, float32."""
        return self.lm_head(hidden).logits()

    def mlm_logits(self, hidden: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """Scores of the token at each place, float32; give it only the places that are asked for."""
        return self.mlm_head(hidden).logits()

    def classify(
        self, hidden: Float[Array, "batch length embed"], batch: Batch, train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Scores of the classes, float32, or the predicted number where there is one."""
        return self.heads.classification(hidden, _segments(batch, self._last_prefix()), train)

    def span_logits(self, hidden: Float[Array, "batch length embed"], batch: Batch) -> Float[Array, "batch length 2"]:
        """Scores of each token being the first and the last of the answer, float32."""
        return span_scores(self.heads.span(hidden), _segments(batch, self._last_prefix()))

    def _last_prefix(self) -> str:
        return "decoder_" if self.config.architecture == "encoder_decoder" else ""

    def _run(self, stack, batch, prefix, train, encoded=None, cache=None):
        tokens = batch[f"{prefix}tokens"]
        length = tokens.shape[1]
        causal = stack.causal
        if cache is None:
            segments = _segments(batch, prefix)
            whole = f"{prefix}segments" not in batch
            mask = Mask(segments, segments, None, batch.get("prefix") if causal else None, causal, whole)
        elif cache.index is None:
            segments = cache.segments[:, :length]
            mask = Mask(segments, segments, None, None if cache.prefix is None else cache.prefix[:, :length], causal)
        else:
            segments = jax.lax.dynamic_slice_in_dim(cache.segments, cache.index, length, axis=1)
            mask = Mask(segments, cache.segments, cache.index, cache.prefix, causal)
        positions = batch.get(f"{prefix}positions")
        if positions is None:
            positions = jnp.broadcast_to(mask.query_places(), tokens.shape)
        if self.config.position == "learned" and length > self.config.max_length:
            raise ConfigError(
                f"a row of {length} tokens does not fit model.max_length ({self.config.max_length}), the positions "
                "that the learned table holds; shorten the text or use another kind of model.position."
            )
        cross_mask = None
        if encoded is not None:
            whole = mask.whole and "encoder_segments" not in batch
            cross_mask = Mask(segments, _segments(batch, "encoder_"), mask.start, whole=whole)
            encoded = constrain(encoded, "batch", "key_length", None)
        x = self.embeddings(tokens, positions, batch.get("token_types"), train)
        return stack(x, Context(mask, positions, None, encoded, cross_mask, cache, train))


def _segments(batch: Batch, prefix: str) -> Int[Array, "batch length"]:
    segments = batch.get(f"{prefix}segments")
    return jnp.ones_like(batch[f"{prefix}tokens"]) if segments is None else segments


def init_params(model: Transformer, key: Key[Array, ""]) -> PyTree:
    """Fresh parameters, boxed with the logical names of their axes."""
    two = model.config.architecture == "encoder_decoder"
    tokens = jnp.zeros((1, 1), jnp.int32)
    batch = dict.fromkeys(("encoder_tokens", "decoder_tokens") if two else ("tokens",), tokens)
    params_key, jitter_key = jax.random.split(key)
    return model.init({"params": params_key, "jitter": jitter_key}, batch)["params"]
