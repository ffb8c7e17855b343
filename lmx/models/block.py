"""One layer: self-attention, cross-attention where there is an encoder, feed-forward; post-norm or pre-norm."""

import functools
from collections.abc import Callable

import flax.linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from lmx.kernels.attention import Mask
from lmx.model_config import Model
from lmx.models.attention import Attention, Cache
from lmx.models.experts import SwitchFeedForward
from lmx.models.feed_forward import FeedForward
from lmx.models.layers import Dropout, Norm
from lmx.parallel.sharding import constrain


@struct.dataclass
class Context:
    """What every layer of a stack reads beside the residual stream."""

    mask: Mask
    positions: Int[Array, "batch length"]
    bias: Float[Array, "heads distances"] | None = None
    encoded: Float[Array, "batch source embed"] | None = None
    cross_mask: Mask | None = None
    cache: Cache | None = None
    train: bool = struct.field(pytree_node=False, default=False)


class Block(nn.Module):
    """A Transformer layer.

    Post-norm is Vaswani et al. 2017, section 3.1: ``H = LayerNorm(H + SelfAttention(H))``, then
    ``H = LayerNorm(H + FFN(H))``. Pre-norm is ``H = H + SelfAttention(LayerNorm(H))`` and so on (GPT-2,
    section 2.3); in parallel, ``H + SelfAttention(LayerNorm(H)) + FFN(LayerNorm'(H))`` (GPT-NeoX, section 2.1.2).
    Dropout is on each sub-layer's output, before the sum.

    Attributes:
      window: see :class:`Attention`.
      sparse: the feed-forward is a Switch layer.
      cross: there is a cross-attention sub-layer.
    """

    config: Model
    window: int = 0
    sparse: bool = False
    cross: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch length embed"], context: Context) -> Float[Array, "batch length embed"]:
        config, train = self.config, context.train

        def self_attention(h):
            attention = Attention(config, self.window, name="attention")
            return attention(
                h,
                h,
                mask=context.mask,
                positions=context.positions,
                bias=context.bias,
                cache=context.cache,
                train=train,
            )

        def cross_attention(h):
            attention = Attention(config, cross=True, name="cross_attention")
            encoded, positions = context.encoded, context.positions
            return attention(h, encoded, mask=context.cross_mask, positions=positions, cache=context.cache, train=train)

        def feed_forward(h):
            if self.sparse:
                return SwitchFeedForward(config, name="experts")(h, context.mask.query_segments, train)
            return FeedForward(config, name="mlp")(h, train)

        if config.parallel_residual:
            return self._parallel({"attention_norm": self_attention, "mlp_norm": feed_forward}, x, train)
        x = self._residual("attention_norm", self_attention, x, train)
        if self.cross:
            x = self._residual("cross_attention_norm", cross_attention, x, train)
        return self._residual("mlp_norm", feed_forward, x, train)

    def _parallel(self, sublayers, x, train):
        """``x`` plus all sub-layers of it, each after its own norm."""
        dropout = functools.partial(Dropout(self.config.dropout), train=train)
        normed = {name: Norm(self.config, name=name)(x) for name in sublayers}
        x = x + sum(dropout(_among_residuals(sublayer, normed[name])) for name, sublayer in sublayers.items())
        self.sow("intermediates", "mlp_residual", x)
        return x

    def _residual(self, norm_name, sublayer, x, train):
        """``x`` plus the sub-layer, with the norm before it or after the sum."""
        norm = Norm(self.config, name=norm_name)
        dropout = functools.partial(Dropout(self.config.dropout), train=train)
        if self.config.norm_position == "post":
            x = norm(x + dropout(_among_residuals(sublayer, x)))
        else:
            x = x + dropout(_among_residuals(sublayer, norm(x)))
        self.sow("intermediates", norm_name.replace("_norm", "_residual"), x)
        return x


def _among_residuals(
    sublayer: Callable[[Array], Array], x: Float[Array, "batch length embed"]
) -> Float[Array, "batch length embed"]:
    """The sub-layer's output, laid out as the residual stream is (Korthikanti et al. 2022, section 4.2.2)."""
    return constrain(sublayer(constrain(x, "batch", "length", None)), "batch", "residual_length", None)
