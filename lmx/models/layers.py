"""The smallest pieces: initializers, projections and norms. All parameters are float32 and carry the logical
names of their axes; all computation is in ``config.dtype``."""

import math
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from lmx.kernels.dropout import dropout
from lmx.kernels.int8 import Quantized, dense, quantize
from lmx.kernels.products import Turned, flat, product
from lmx.model_config import Model
from lmx.models.lora import has_adapter
from lmx.parallel.sharding import gathered

PRODUCT = "product"  # the name of what a projection gives, by which remat policies keep it


def kernel_init(config: Model, num_inputs: int = 1, *, scale: float = 1.0, batched: bool = False):
    """The initializer of a kernel whose first ``num_inputs`` axes are contracted.

    Args:
      config: gives the scheme: normal (BERT, GPT), fan_in (T5, Switch) or xavier (Vaswani).
      num_inputs: how many leading axes are inputs; the others are outputs.
      scale: multiplies the standard deviation.
      batched: the first axis counts independent kernels (experts) and belongs to neither.
    """
    if config.initializer == "normal":
        matrix = nn.initializers.normal(config.init_stddev * scale)
    elif config.initializer == "fan_in":
        matrix = nn.initializers.variance_scaling(config.init_scale * scale**2, "fan_in", "truncated_normal")
    else:
        matrix = nn.initializers.variance_scaling(scale**2, "fan_avg", "uniform")

    def init(rng, shape, dtype=jnp.float32):
        if batched:
            return jax.vmap(lambda key: init_one(key, shape[1:], dtype))(jax.random.split(rng, shape[0]))
        return init_one(rng, shape, dtype)

    def init_one(rng, shape, dtype):
        inputs = math.prod(shape[:num_inputs])
        return matrix(rng, (inputs, math.prod(shape[num_inputs:])), dtype).reshape(shape)

    return init


def residual_scale(config: Model) -> float:
    """GPT-2's factor on the initial values of projections that write to the residual stream (section 2.3)."""
    return 1 / math.sqrt(2 * config.num_layers) if config.scale_residual_init else 1.0


class Projection(nn.Module):
    """``x @ kernel + bias`` over the last ``num_inputs`` axes of ``x``.

    Attributes:
      features: sizes of the output axes.
      axes: logical names of the kernel's axes, inputs first.
      num_inputs: how many axes are contracted.
      init_scale: multiplies the initial standard deviation.
      use_bias: none takes ``config.use_bias``.
    """

    config: Model
    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    num_inputs: int = 1
    init_scale: float = 1.0
    use_bias: bool | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        dtype = jnp.dtype(self.config.dtype)
        shape = x.shape[x.ndim - self.num_inputs :] + self.features
        init = kernel_init(self.config, self.num_inputs, scale=self.init_scale)
        kernel = kernel_of(self, nn.with_logical_partitioning(init, self.axes), shape)
        offer_turned(self, kernel, self.num_inputs)
        offer_quantized(self, kernel, range(self.num_inputs))
        y = product(x.astype(dtype), kernel, self.num_inputs, self.config.products)
        y = checkpoint_name(flat(y, len(self.features)), PRODUCT).reshape(y.shape)
        if self.config.use_bias if self.use_bias is None else self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[self.num_inputs :])
            y += self.param("bias", init, self.features).astype(dtype)
        if has_adapter(self.config, self.path):
            down, up = adapter(self, shape, self.axes, self.num_inputs)
            low = product(x.astype(dtype), down, self.num_inputs)
            y += self.config.lora.alpha / self.config.lora.rank * product(low, up)
        return y


def kernel_of(module: nn.Module, init: Callable, shape: tuple[int, ...]) -> Array | Quantized | Turned:
    """The parameter "kernel", which may be turned: Flax would take it for one of a wrong shape."""
    found = module.get_variable("params", "kernel")
    return found if isinstance(found, Turned) else module.param("kernel", init, shape)


def offer_turned(module: nn.Module, kernel: Array | Quantized | Turned, num_inputs: int) -> None:
    """Puts a kernel with its outputs first into collection "turned", if that is asked for."""
    if module.is_mutable_collection("turned") and not module.is_initializing():
        module.put_variable("turned", "kernel", Turned.of(kernel, num_inputs))


def offer_quantized(module: nn.Module, kernel: Array | Quantized | Turned, axes: Iterable[int]) -> None:
    """Puts a kernel in eight bits into collection "quantized", if that is asked for; ``axes`` are those summed over."""
    if module.is_mutable_collection("quantized") and not module.is_initializing():
        name = "kernel" if module.has_variable("params", "kernel") else "table"
        module.put_variable("quantized", name, quantize(kernel, tuple(axes)))


class UnembeddingKernel(nn.Module):
    """The kernel of the last layer, [embed, vocab], with its adapter added to it."""

    config: Model

    @nn.compact
    def __call__(self) -> Float[Array, "embed vocab"] | Quantized | Turned:
        config, axes = self.config, ("embed", "vocab")
        shape = (config.embed_dim, config.vocab_size)
        kernel = kernel_of(self, nn.with_logical_partitioning(kernel_init(config), axes), shape)
        offer_quantized(self, kernel, (0,))
        if has_adapter(config, self.path):
            down, up = adapter(self, shape, axes)
            kernel = dense(kernel, "float32") + config.lora.alpha / config.lora.rank * (down @ up)
        else:
            offer_turned(self, kernel, 1)
        if isinstance(kernel, Quantized | Turned):
            return kernel
        return gathered(kernel.astype(config.dtype), (None, "vocab"), axes)


def adapter(
    module: nn.Module, shape: tuple[int, ...], axes: tuple[str | None, ...], num_inputs: int = 1
) -> tuple[Float[Array, "... rank"], Float[Array, "rank ..."]]:
    """A and B, of which ``alpha / rank * A B`` adds to a kernel of this shape (Hu et al. 2021, section 4.1).

    A is Gaussian at first and B zero. They become parameters of the module that has the kernel.
    """
    inputs, features, rank = shape[:num_inputs], shape[num_inputs:], module.config.lora.rank
    init = nn.initializers.normal(1 / math.sqrt(math.prod(inputs)))
    init = nn.with_logical_partitioning(init, (*axes[:num_inputs], None))
    down = module.param("lora_a", init, (*inputs, rank))
    init = nn.with_logical_partitioning(nn.initializers.zeros, (None, *axes[num_inputs:]))
    return down, module.param("lora_b", init, (rank, *features))


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the last axis, computed in float32.

    Attributes:
      axis: logical name of the last axis.
    """

    config: Model
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "... embed"]) -> Float[Array, "... embed"]:
        config, shape = self.config, x.shape[-1:]
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, (self.axis,)), shape)
        bias = None
        if config.norm == "layernorm" and config.use_bias:
            bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, (self.axis,)), shape)

        def normalized(x, scale, bias):
            y = x.astype(jnp.float32)
            if config.norm == "layernorm":
                y -= y.mean(-1, keepdims=True)
            y *= jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + config.norm_epsilon)
            y *= scale
            return (y if bias is None else y + bias).astype(config.dtype)

        return recomputed(normalized)(x, scale, bias)


def recomputed(function: Callable) -> Callable:
    """``function``, of which only the arguments are kept for the backward pass: what is soon computed again but would
    take room, and time to write and read, until then."""
    return jax.checkpoint(function, prevent_cse=False)


class Dropout(nn.Module):
    """Dropout of rng "dropout", while training."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "..."], train: bool) -> Float[Array, "..."]:
        return dropout(self.make_rng("dropout"), x, self.rate) if train and self.rate else x


class Table(nn.Module):
    """A table of vectors, looked up by id."""

    config: Model
    rows: int
    axis: str | None = None

    @nn.compact
    def __call__(self) -> Float[Array, "rows embed"] | Quantized:
        init = nn.initializers.normal(self.config.embedding_stddev)
        init = nn.with_logical_partitioning(init, (self.axis, "embed"))
        table = self.param("table", init, (self.rows, self.config.embed_dim))
        offer_quantized(self, table, (1,))
        if isinstance(table, Quantized):
            return table
        return gathered(table.astype(self.config.dtype), (self.axis, None), (self.axis, "embed"))
