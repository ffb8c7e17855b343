"""The last layer and the cross-entropy after it as one, so that the logits of a large batch never all stand in memory.

They are a batch's largest array by far: 1.6 GB for 8 x 1,024 tokens over 50,257 ids. Here they are computed for a
chunk of the tokens at a time, and where a gradient is wanted it is computed in the same pass, while the chunk is at
hand: nothing is computed twice, and backward only scales what is there, since the loss is one number. The same idea as
a GPU kernel is Hsu et al. 2024 (Liger Kernel), section 3.2.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from lmx.kernels.chunks import CHUNK, CHUNK_LOGITS, in_chunks, in_chunks_that_count
from lmx.kernels.cross_entropy import cross_entropy_reference, scores, scores_and_gradient, vocab_is_split
from lmx.kernels.int8 import Quantized, dense
from lmx.kernels.products import product_by_rows
from lmx.parallel.sharding import constrain, current_platform

# Most logits of a chunk on a GPU, which computes as many as CHUNK_LOGITS in the time that it takes to write them and
# the sums a few times.
GPU_CHUNK_LOGITS = 1 << 28
GPU_VOCAB = 128  # what the vocabulary is a multiple of in a GPU's products, whose rows then all begin alike


@struct.dataclass
class Unembedding:
    """The last layer, not computed yet: logits are ``hidden @ kernel + bias``.

    Attributes:
      hidden: what it reads, in the type that the product is computed in.
      kernel: [vocab, embed] as a token table has it, or [embed, vocab]; of the same type, or quantized with a scale
        for each id.
      bias: added to the logits, in float32.
      tied: the kernel is [vocab, embed].
    """

    hidden: Float[Array, "... embed"]
    kernel: Float[Array, "rows columns"] | Quantized
    bias: Float[Array, " vocab"] | None = None
    tied: bool = struct.field(pytree_node=False, default=True)

    def logits(self) -> Float[Array, "... vocab"]:
        """All of them, float32."""
        logits = _product(self.hidden, self.kernel, self.bias, self.tied)
        return constrain(logits, "batch", "length", "vocab") if logits.ndim == 3 else logits


@struct.dataclass
class TokenScores:
    """How well each token was predicted.

    Attributes:
      loss: the weighted sum of the tokens' cross-entropies, in nats. It alone has a gradient.
      nll: the cross-entropy of each token, in nats.
      right: at each place, whether no id is likelier than the target, and not all are equally likely.

    Where weights are sparse and this one is zero, ``nll`` and ``right`` may be zero and false.
    """

    loss: Float[Array, ""]
    nll: Float[Array, "batch length"]
    right: Bool[Array, "batch length"]


def linear_cross_entropy(
    unembedding: Unembedding,
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    sparse: bool = False,
    chunk_logits: int | None = None,
) -> TokenScores:
    """Scores predictions of ``targets``, as :func:`lmx.kernels.cross_entropy.cross_entropy` of all logits would.

    Args:
      unembedding: the last layer, over hidden states [batch, length, embed].
      targets: the right ids.
      weights: what each token counts; they get no gradient.
      label_smoothing, z_loss: see :func:`lmx.kernels.cross_entropy.cross_entropy`.
      sparse: many weights may be zero, and where they are nothing need be computed
        (:func:`lmx.kernels.chunks.in_chunks_that_count`).
      chunk_logits: most logits that a device holds at a time, if one place of each of its rows has no more; none: 2^26,
        or 2^28 of a GPU.
    """
    vocab_size = unembedding.kernel.shape[0 if unembedding.tied else 1]
    on_gpu = current_platform() == "gpu"
    added = -vocab_size % GPU_VOCAB if on_gpu and not vocab_is_split() else 0
    limit = chunk_logits or (GPU_CHUNK_LOGITS if on_gpu else CHUNK_LOGITS)
    scoring = _Scoring(unembedding.tied, label_smoothing, z_loss, vocab_size, added, limit, sparse)
    kernel = dense(unembedding.kernel, unembedding.hidden.dtype)
    loss, nll, right = _scores(scoring, unembedding.hidden, kernel, unembedding.bias, targets, weights)
    return TokenScores(loss, jax.lax.stop_gradient(nll), jax.lax.stop_gradient(right))


def linear_cross_entropy_reference(
    unembedding: Unembedding,
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> TokenScores:
    """The same from all logits at once."""
    logits = unembedding.logits()
    nll = cross_entropy_reference(logits, targets, label_smoothing, z_loss)
    right = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] >= logits.max(-1)
    right &= logits.min(-1) < logits.max(-1)
    return TokenScores(jnp.sum(nll * weights), jax.lax.stop_gradient(nll), right)


class _Scoring(NamedTuple):
    tied: bool
    label_smoothing: float
    z_loss: float
    vocab_size: int
    added: int  # logits of no id, so that rows of them are as long as suits a GPU
    chunk_logits: int  # at most
    sparse: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(scoring, hidden, kernel, bias, targets, weights):
    """The loss, and ``nll`` and ``right`` of every chunk."""
    kernel, bias = _with_added(scoring, kernel, bias)

    def body(loss, chunk):
        x, targets, weights = chunk
        logits = _chunk_logits(scoring, x, kernel, bias)
        nll, right = scores(logits, targets, scoring.label_smoothing, scoring.z_loss, scoring.vocab_size)
        return loss + jnp.sum(nll * weights), (nll, right)

    def through(chunks):
        return jax.lax.scan(body, jnp.zeros(()), chunks)

    loss, (nll, right) = _in_chunks(scoring, through, hidden, targets, weights)
    return loss, nll, right


def _scores_and_gradients(scoring, hidden, kernel, bias, targets, weights):
    # The gradient of a frozen layer would take the memory and the work of a trained one's.
    trains = kernel.perturbed or (bias is not None and bias.perturbed)
    hidden, kernel, targets, weights = (x.value for x in (hidden, kernel, targets, weights))
    bias = None if bias is None else bias.value
    wide, wide_bias = _with_added(scoring, kernel, bias)

    def body(chunk):
        x, targets, weights = chunk
        logits = _chunk_logits(scoring, x, wide, wide_bias)
        nll, right, of_logits = scores_and_gradient(
            logits, targets, weights, scoring.label_smoothing, scoring.z_loss, scoring.vocab_size
        )
        of_logits = constrain(of_logits, *CHUNK, "vocab")
        of_kernel = of_bias = None  # else a sum for each shard of the batch, to be added up when all chunks were seen
        if trains and bias is not None:
            of_bias = jnp.einsum("abcd,abcdv->acv", jnp.ones_like(weights), of_logits)  # a product sums faster
            of_bias = constrain(of_bias, "batch", "length", "vocab")
        of_logits = of_logits.astype(x.dtype)
        if trains:  # as [embed, vocab], so that no product has to have the logits turned over
            of_kernel = jnp.einsum("abcde,abcdv->acev", x, of_logits, preferred_element_type=jnp.float32)
            of_kernel = constrain(of_kernel, "batch", "length", None, "vocab")
        of_x = jnp.einsum(f"abcdv,{_axes(scoring.tied)}->abcde", of_logits, wide)
        sums = (jnp.sum(nll * weights), of_kernel, of_bias)
        return sums, (nll, right, constrain(of_x, *CHUNK, None))

    def through(chunks):
        (loss, of_kernel, of_bias), outputs = _summed(body, chunks)
        if of_kernel is not None:  # until backward uses it, in parts as the parameter is
            of_kernel = _over_shards(of_kernel, kernel)
            of_kernel = constrain(of_kernel[:, : scoring.vocab_size], "embed", "vocab")
            of_kernel = of_kernel.T if scoring.tied else of_kernel
        if of_bias is not None:
            of_bias = _over_shards(of_bias, bias)[: scoring.vocab_size]
        return (loss, of_kernel, of_bias), outputs

    (loss, of_kernel, of_bias), (nll, right, of_hidden) = _in_chunks(scoring, through, hidden, targets, weights)
    return (loss, nll, right), (of_hidden, of_kernel, of_bias)


def _in_chunks(scoring, compute, hidden, targets, weights):
    """The sums, and what there is of each place, that ``compute`` finds of chunks."""
    go = in_chunks_that_count if scoring.sparse else in_chunks
    return go(compute, scoring.vocab_size, scoring.chunk_logits, hidden, targets, weights)


def _summed(body, chunks):
    """``body`` of every chunk: the first of its results added up, the second stacked."""
    first = jax.tree.map(lambda x: x[0], chunks)
    if len(chunks[0]) == 1:  # no loop, whose large sums would start from zeros
        sums, outputs = body(first)
        return sums, jax.tree.map(lambda x: x[None], outputs)

    def add(sums, chunk):
        more, outputs = body(chunk)
        return jax.tree.map(jnp.add, sums, more), outputs

    shapes, _ = jax.eval_shape(body, first)
    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), chunks)


def _over_shards(x, like):
    """The sum over the shards of the batch, sent between devices in the type that it is wanted in."""
    return jax.lax.reduce(x.astype(like.dtype), jnp.zeros((), like.dtype), jax.lax.add, (0, 1))


def _scaled(scoring, gradients, cotangents):
    by_loss = cotangents[0]  # in float32, as a loss by its weight would lose digits; nll and right have no gradient
    return *jax.tree.map(lambda x: (x * by_loss).astype(x.dtype), gradients), None, None


_scores.defvjp(_scores_and_gradients, _scaled, symbolic_zeros=True)


def _axes(tied):
    """The kernel's axes, v(ocabulary) and e(mbedding), in the order in which they stand."""
    return "ve" if tied else "ev"


def _product(hidden, kernel, bias, tied):
    values = kernel.values.astype(hidden.dtype) if isinstance(kernel, Quantized) else kernel
    if tied:
        logits = product_by_rows(hidden, values, "float32")
    else:
        logits = jnp.einsum("...e,ev->...v", hidden, values, preferred_element_type=jnp.float32)
    if isinstance(kernel, Quantized):
        logits *= kernel.scale.reshape(-1)
    return logits if bias is None else logits + bias


def _with_added(scoring, kernel, bias):
    """The kernel and the bias with zeros for the logits that are added."""
    if not scoring.added:
        return kernel, bias
    added = ((0, scoring.added), (0, 0))
    kernel = jnp.pad(kernel, added if scoring.tied else added[::-1])
    return kernel, None if bias is None else jnp.pad(bias, (0, scoring.added))


def _chunk_logits(scoring, x, kernel, bias):
    return constrain(_product(x, kernel, bias, scoring.tied), *CHUNK, "vocab")
