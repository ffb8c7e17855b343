"""Multi-head attention as a module: projections, rotary positions and the decoding cache around the kernel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from lmx.kernels import attention as kernels
from lmx.kernels.attention import Mask
from lmx.kernels.int8 import Quantized, quantize
from lmx.model_config import Model
from lmx.models.layers import Norm, Projection, residual_scale
from lmx.models.positions import rotate
from lmx.parallel.sharding import constrain


@struct.dataclass
class Cache:
    """Where decoding stands. Keys and values themselves are the "cache" collection of the attention modules.

    Attributes:
      index: slots filled before this call; its tokens go to the slots from there on. None: there is nothing yet but
        these tokens, which see each other alone.
      segments: 1 for slots that hold, or will hold, a token of the row; 0 for padding before its prompt.
      prefix: 1 for slots that every later one and each other see (prefix LM), or none.
      int8: keys and values are kept in eight bits, with a scale for each head of a token.
    """

    index: Int[Array, ""] | None
    segments: Int[Array, "batch slots"]
    prefix: Int[Array, "batch slots"] | None = None
    int8: bool = struct.field(pytree_node=False, default=False)

    @property
    def has_rows(self) -> bool:
        """Whether what is stored has an axis of rows. A single row has none: a product on a CPU drops such an axis, and
        with that step between, XLA would make what it stores in place a second time, from a copy of all of it."""
        return self.int8 or len(self.segments) > 1

    def stored(self, x: Float[Array, "batch tokens kv_heads head_dim"]) -> Array | Quantized:
        """Keys or values as they are stored, [batch, kv_heads, tokens, head_dim]: as the products of decoding read
        them, which would otherwise turn all of the cache over for every token."""
        x = _turned(quantize(x, (3,)) if self.int8 else x)
        return x if self.has_rows else x[0]

    def read(self, stored: Array | Quantized) -> Array | Quantized:
        """The inverse of :meth:`stored`, but for the numbers' type."""
        return _turned(stored if self.has_rows else stored[None])


def attention_form(
    config: Model, rows: int, length: int, context: int | None = None, has_prefix: bool = False
) -> kernels.Choice:
    """The form that attention has in training, on the current layout's devices, for so many rows of a length.

    Args:
      context: the length of what cross-attention reads; none is self-attention.
      has_prefix: rows begin with tokens that all see each other.

    Raises:
      ConfigError: ``config.attention`` asks for one that cannot be had.
    """
    case = kernels.Case(
        rows,
        length,
        context or length,
        config.num_heads,
        config.head_dim or config.embed_dim // config.num_heads,
        config.dtype,
        has_bias=config.position == "relative" and context is None,
        has_dropout=config.attention_dropout > 0,
        has_prefix=has_prefix,
    )
    return kernels.choose(config.attention, case)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2), grouped or multi-query by ``num_kv_heads``.

    Attributes:
      window: tokens that a query sees back (and ahead, unless causal), itself included; 0 sees all.
      cross: keys and values come from ``context``.
    """

    config: Model
    window: int = 0
    cross: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch query embed"],
        context: Float[Array, "batch key embed"],
        *,
        mask: Mask,
        positions: Int[Array, "batch query"],
        bias: Float[Array, "heads distances"] | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> Float[Array, "batch query embed"]:
        config = self.config
        head_dim = config.head_dim or config.embed_dim // config.num_heads
        # Unscaled scores keep unit variance when the query starts smaller (T5, Mesh TensorFlow's fan-in rule).
        folded = head_dim**-0.5 if config.attention_scale == "none" and config.initializer == "fan_in" else 1.0
        shape, axes = (config.num_heads, head_dim), ("embed", "heads", "head_dim")
        query = Projection(config, shape, axes, init_scale=folded, use_bias=self._has_bias("qkv"), name="query")(x)
        if config.query_key_norm:
            query = Norm(config, "head_dim", name="query_norm")(query)
        if config.position == "rotary" and not self.cross:
            query = rotate(query, positions, config)
        key, value = self._keys_and_values(context, head_dim, positions, cache)
        names = ("batch", "length", "heads", "head_dim")
        query = constrain(query, *names)
        scale = head_dim**-0.5 if config.attention_scale == "rsqrt" else 1.0
        options = {"scale": scale, "window": self.window, "bias": bias}
        rate = config.attention_dropout if train else 0.0
        rng = self.make_rng("dropout") if rate else None
        dropout = {"dropout_rate": rate, "dropout_rng": rng}
        output = kernels.attention(query, key, value, mask, **options, **dropout, implementation=config.attention)
        if self.is_mutable_collection("intermediates"):
            self.sow("intermediates", "weights", kernels.attention_weights(query, key, mask, **options))
        output = constrain(output, *names)
        axes = ("heads", "head_dim", "embed")
        scale, bias = residual_scale(config), self._has_bias("all")
        out = Projection(config, (config.embed_dim,), axes, num_inputs=2, init_scale=scale, use_bias=bias, name="out")
        return out(output)

    def _has_bias(self, least: str) -> bool:
        """Whether projections have biases that are there when ``config.attention_bias`` is ``least`` or more."""
        chosen = self.config.attention_bias
        return self.config.use_bias if chosen is None else chosen in (least, "all")

    def _keys_and_values(self, context, head_dim, positions, cache):
        """Keys and values of ``context``, or of all slots of the cache once ``context`` has joined what was there."""
        config = self.config
        if self.cross and self.has_variable("cache", "cached_key"):  # the encoder's output does not change
            return tuple(cache.read(self.get_variable("cache", name)) for name in ("cached_key", "cached_value"))
        kv_heads = config.num_kv_heads or config.num_heads
        axes = ("embed", "kv_heads", "head_dim")
        bias = self._has_bias("qkv")
        key = Projection(config, (kv_heads, head_dim), axes, use_bias=bias, name="key")(context)
        value = Projection(config, (kv_heads, head_dim), axes, use_bias=bias, name="value")(context)
        if config.query_key_norm:
            key = Norm(config, "head_dim", name="key_norm")(key)
        if config.position == "rotary" and not self.cross:
            key = rotate(key, positions, config)
        key, value = (constrain(x, "batch", "key_length", "kv_heads", "head_dim") for x in (key, value))
        if cache is None:
            return key, value
        return self._cached("cached_key", key, cache), self._cached("cached_value", value, cache)

    def _cached(self, name, new, cache):
        """Stores what is new; returns what the queries read."""
        kept = cache.stored(new)
        if self.cross:
            return cache.read(self.variable("cache", name, lambda: kept).value)
        first, slots = 0 if cache.index is None else cache.index, cache.segments.shape[1]

        def empty(x):
            return jnp.zeros((*x.shape[:-2], slots, x.shape[-1]), x.dtype)

        def put(into, x):
            return jax.lax.dynamic_update_slice_in_dim(into, x, first, axis=x.ndim - 2)

        stored = self.variable("cache", name, lambda: jax.tree.map(empty, kept))
        stored.value = jax.tree.map(put, stored.value, kept)
        return new if cache.index is None else cache.read(stored.value)


def _turned(x):
    """[batch, tokens, kv_heads, head_dim], quantized or not, with heads before tokens; or back."""
    return jax.tree.map(lambda part: part.swapaxes(1, 2), x)
