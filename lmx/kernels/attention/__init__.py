"""Scaled dot-product attention: ``softmax(Q K^T / sqrt(d_k)) V`` (Vaswani et al. 2017, equation 1), in four forms.

``plain`` is the formula; ``blockwise`` is it a block of queries at a time; ``cudnn`` and ``pallas`` are fused kernels,
of NVIDIA GPUs and of TPUs. All take the same mask and give the same values. :func:`choose` says which is run, and why.
"""

import dataclasses

from jaxtyping import Array, Float, Key

from lmx.errors import ConfigError
from lmx.kernels.attention.blockwise import blockwise_attention
from lmx.kernels.attention.cudnn import cudnn_attention, segment_width
from lmx.kernels.attention.mask import Mask
from lmx.kernels.attention.plain import attention_weights, plain_attention
from lmx.kernels.int8 import Quantized
from lmx.parallel.sharding import current_layout, current_platform

__all__ = ["Case", "Choice", "Mask", "attention", "attention_weights", "choose"]

LONG = 1024  # queries and keys from which plain attention's square of them is no longer worth its simplicity
WIDEST = 128  # head that cuDNN's kernels take on every GPU
FUSED = {"gpu": "cudnn", "tpu": "pallas"}
NAMES = {"plain": "plain XLA", "blockwise": "blockwise XLA", "cudnn": "cuDNN's fused kernel", "pallas": "Pallas kernel"}


@dataclasses.dataclass(frozen=True)
class Case:
    """What a form of attention is chosen by.

    Attributes:
      rows, queries, keys, heads, head_dim: sizes, of all devices together.
      dtype: of queries, keys and values.
      has_bias: scores have a bias by distance.
      has_dropout: weights have dropout.
      has_prefix, is_whole: see :class:`Mask`.
      is_decoding: queries are a few at the end of the keys.
    """

    rows: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    dtype: str
    has_bias: bool = False
    has_dropout: bool = False
    has_prefix: bool = False
    is_whole: bool = False
    is_decoding: bool = False


@dataclasses.dataclass(frozen=True)
class Choice:
    """A form of attention.

    Attributes:
      name: plain, blockwise, cudnn or pallas.
      reason: why it is not a faster one; empty if it is the fastest here.
    """

    name: str
    reason: str = ""

    def __str__(self) -> str:
        return NAMES[self.name] + (f" ({self.reason})" if self.reason else "")


def choose(asked: str, case: Case) -> Choice:
    """The form of attention that runs on the current layout's devices.

    Args:
      asked: auto: the fastest that there is; flash: a fused kernel or an error; blockwise; plain.

    Raises:
      ConfigError: ``asked`` is flash, and there is no fused kernel for this case.
    """
    if asked == "plain" or case.is_decoding:
        return Choice("plain")
    platform = current_platform()
    fused = FUSED.get(platform)
    reason = f"no fused kernel exists for {platform}"
    if fused is not None:
        reason = _lacks(fused, case)
    if asked == "flash" and reason:
        raise ConfigError(
            f"model.attention='flash' cannot be had: {reason}. Set model.attention='auto', which takes the fastest "
            "form there is and says which."
        )
    if asked != "blockwise" and fused is not None and not reason:
        return Choice(fused)
    if asked == "blockwise":
        return Choice("blockwise", "as model.attention asks")
    short = case.queries * case.keys < LONG * LONG
    return Choice("plain" if short or _shards("length") > 1 else "blockwise", reason)


def _lacks(fused: str, case: Case) -> str:
    """Why a fused kernel cannot do this; empty if it can."""
    if _shards("length") > 1 and (fused == "cudnn" or case.has_bias):
        biased = " with a bias by distance" if case.has_bias else ""
        return f"{NAMES[fused]} needs whole rows{biased} on a device (mesh.sequence)"
    sizes = {"batch": case.rows, "length": case.queries, "heads": case.heads}
    if uneven := [name for name, size in sizes.items() if size > _shards(name) and size % _shards(name)]:
        return f"{uneven[0]} of {sizes[uneven[0]]} does not divide over {_shards(uneven[0])} devices"
    if fused == "pallas":
        return ""
    if case.has_dropout:
        return f"{NAMES[fused]} would drop the same weights at every step (model.attention_dropout)"
    if case.dtype not in ("bfloat16", "float16"):
        return f"{NAMES[fused]} computes in 16 bits, and model.dtype is {case.dtype}"
    if case.has_bias and case.has_prefix:
        return f"{NAMES[fused]} has no gradient of a bias by distance in rows with a prefix (model.position='relative')"
    widest = WIDEST - (segment_width(case.queries, case.keys) if case.has_bias and not case.is_whole else 0)
    if case.head_dim % 8 or case.head_dim > widest:
        return f"{NAMES[fused]} needs heads that are a multiple of 8 and at most {widest} wide, not {case.head_dim}"
    if (not case.is_whole or case.has_bias) and (case.queries % 2 or case.keys % 2):
        return f"{NAMES[fused]} needs rows of even length, not {case.queries} and {case.keys}"
    return ""


def _shards(name: str) -> int:
    """Parts that the current layout cuts a logical axis into."""
    layout = current_layout()
    return 1 if layout is None else layout.devices_along(layout.axes(name))


def attention(
    query: Float[Array, "batch query heads head_dim"],
    key: Float[Array, "batch key kv_heads head_dim"] | Quantized,
    value: Float[Array, "batch key kv_heads head_dim"] | Quantized,
    mask: Mask,
    *,
    scale: float = 1.0,
    window: int = 0,
    bias: Float[Array, "heads distances"] | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Key[Array, ""] | None = None,
    implementation: str = "auto",
) -> Float[Array, "batch query heads head_dim"]:
    """Attention with grouped heads: query head h reads key/value head ``h // (heads / kv_heads)``.

    Softmax is float32 whatever the inputs are. A query that may see no key gets something finite that means nothing
    (the mean of the values, or zeros), and gradients of zero where the loss does not use it.

    Args:
      key, value: quantized only from a cache, with a scale for each head of a token.
      scale: multiplies ``Q K^T``.
      window: see :meth:`Mask.allowed`.
      bias: added to the scaled scores, by distance (T5); see :meth:`Mask.distances`.
      dropout_rate, dropout_rng: dropout of the attention weights.
      implementation: see :func:`choose`.

    Raises:
      ConfigError: see :func:`choose`.
    """
    case = Case(
        *query.shape[:2],
        key.shape[1],
        *query.shape[2:],
        query.dtype.name,
        has_bias=bias is not None,
        has_dropout=dropout_rate > 0,
        has_prefix=mask.prefix is not None,
        is_whole=mask.whole,
        is_decoding=mask.start is not None or query.shape[1] == 1 or isinstance(key, Quantized),
    )
    options = {"scale": scale, "window": window}
    dropout = {"dropout_rate": dropout_rate, "dropout_rng": dropout_rng}
    match choose(implementation, case).name:
        case "plain":
            return plain_attention(query, key, value, mask, bias=bias, **options, **dropout)
        case "blockwise":
            return blockwise_attention(query, key, value, mask, bias=bias, **options, **dropout)
        case "cudnn":
            return cudnn_attention(query, key, value, mask, bias=bias, **options)
        case _:
            from lmx.kernels.attention.pallas import pallas_attention  # takes a while to import

            return pallas_attention(query, key, value, mask, bias=bias, **options, **dropout)
