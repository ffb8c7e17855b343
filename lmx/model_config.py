"""The schema of the Transformer: the sections that say what a model is, and what follows from them alone.

:mod:`lmx.config` puts them beside the sections of data and training.
"""

import dataclasses
import math

from lmx.schema import option, section

__all__ = ["Experts", "Lora", "Model", "RotaryScaling", "is_sparse", "layer_period"]


@dataclasses.dataclass(frozen=True)
class Experts:
    """Sparse feed-forward: each token is sent to a few of many experts (Fedus et al. 2021, section 2)."""

    num_experts: int = option(0, "Experts of a sparse layer; 0 makes every layer dense.", low=0)
    every: int = option(2, "Every n-th layer is sparse: layers n-1, 2n-1, … counted from 0.", low=1)
    decoder_every: int | None = option(None, "The same of an encoder-decoder's decoder; none: every.", low=1)
    first: int | None = option(None, "The first sparse layer, counted from 0; none: the last of each n.", low=0)
    top_k: int = option(1, "Experts a token is sent to (Switch: 1, Mixtral: 2).", low=1)
    normalize_gates: bool = option(False, "The gates of a token's experts sum to 1 (Mixtral), or are probabilities.")
    capacity_factor: float = option(
        1.25, "Slots of an expert, as a multiple of an even share, in training; 0: no limit.", low=0
    )
    eval_capacity_factor: float = option(2.0, "The same when evaluating and generating.", low=0)
    capacity: int = option(0, "Slots of an expert, whatever the length of a row; 0: by the factors.", low=0)
    load_balance_weight: float = option(0.01, "Weight (alpha) of the load-balance loss, equations 4-6.", low=0)
    z_loss_weight: float = option(0.0, "Weight of the router z-loss (ST-MoE, equation 5).", low=0)
    jitter: float = option(0.01, "Router inputs are multiplied by U(1-jitter, 1+jitter) in training.", low=0, high=1)
    dropout: float = option(0.0, "Dropout inside the experts (the paper's expert dropout).", low=0, high=1)

    def slots(self, length: int, train: bool) -> int:
        """Slots of an expert in a row of so many tokens; 0 is no limit.

        Without a ``capacity``: tokens / experts * capacity factor (equation 3), rounded up, at least one.
        """
        factor = self.capacity_factor if train else self.eval_capacity_factor
        if self.capacity or not factor:
            return min(self.capacity, length)
        share = round(length / self.num_experts * factor, 6)  # 100 / 10 * 1.1 is 11, not 11.000000000000002
        return min(length, max(1, math.ceil(share)))


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021): ``W + alpha / rank * A B``, and only A, B and some heads are trained."""

    rank: int = option(0, "Inner width of an adapter; 0: no adapters.", low=0)
    alpha: float = option(16.0, "The product is multiplied by alpha / rank.", low=0)
    targets: tuple[str, ...] = option(
        ("attention/query", "attention/value"),
        "Projections that have one, by the end of their path: attention/query, mlp/in, out, ….",
    )
    heads: tuple[str, ...] = option(
        ("classification", "span"),
        "Heads that are trained whole beside the adapters; others, such as lm and mlm, stay as they are.",
        choices=("lm", "mlm", "classification", "span", "pooler"),
    )


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies are stretched to reach beyond the length of pre-training."""

    kind: str = option(
        "none",
        "linear: positions divided by the factor. dynamic: the base grows with the row. llama3: low frequencies alone "
        "are divided. yarn: by bands, and attention is sharpened (Peng et al. 2023).",
        choices=("none", "linear", "dynamic", "llama3", "yarn"),
    )
    factor: float = option(1.0, "How many times longer.", low=0)
    original_length: int = option(2048, "Tokens of a row in pre-training (dynamic, llama3, yarn).", low=1)
    low_frequency_factor: float = option(1.0, "llama3: waves longer than original_length / this are divided.", low=0)
    high_frequency_factor: float = option(4.0, "llama3: waves shorter than original_length / this stay.", low=0)
    beta_fast: float = option(32.0, "yarn: dimensions that turn more often than this stay.", low=0)
    beta_slow: float = option(1.0, "yarn: dimensions that turn less often than this are divided.", low=0)
    attention_factor: float | None = option(None, "yarn: factor on sines and cosines; none: 0.1 ln(factor) + 1.", low=0)
    truncate: bool = option(True, "yarn: the bounds of the bands are whole dimensions.")


@dataclasses.dataclass(frozen=True)
class Model:
    """The one Transformer. Every system is a setting of these fields."""

    architecture: str = option(
        "decoder",
        "Which stacks there are. A decoder is causal; with objective prefix_lm its prefix is bidirectional.",
        choices=("encoder", "decoder", "encoder_decoder"),
    )
    heads: tuple[str, ...] = option(
        ("lm",),
        "Output heads; each needs its own parameters.",
        choices=("lm", "mlm", "classification", "span", "pooler"),
    )
    vocab_size: int | None = option(None, "Tokens in the vocabulary; none takes the tokenizer's size.", low=1)
    num_layers: int = option(12, "Layers of a stack (of the encoder, where there are two).", low=1)
    num_decoder_layers: int | None = option(None, "Layers of an encoder-decoder's decoder; none: num_layers.", low=1)
    embed_dim: int = option(768, "Width of the residual stream.", low=1)
    num_heads: int = option(12, "Query heads.", low=1)
    num_kv_heads: int | None = option(None, "Key/value heads: none is num_heads, 1 is multi-query.", low=1)
    head_dim: int | None = option(None, "Width of a head; none: embed_dim / num_heads.", low=1)
    mlp_dim: int = option(3072, "Width of the feed-forward's hidden layer.", low=1)
    max_length: int = option(
        1024, "Positions a learned table holds, which rows must fit; samples of a run end there.", low=1
    )

    norm_position: str = option("pre", "LayerNorm before (pre) or after (post) the sum.", choices=("pre", "post"))
    norm: str = option("layernorm", "Kind of normalization.", choices=("layernorm", "rmsnorm"))
    norm_epsilon: float = option(1e-5, "Added to the variance.", low=0)
    use_bias: bool = option(True, "Biases in projections, feed-forward and LayerNorm.")
    attention_bias: str | None = option(
        None, "Biases in attention; none of these: as use_bias.", choices=("none", "qkv", "all")
    )
    mlp_bias: bool | None = option(None, "Biases in the feed-forward; none: as use_bias.")
    parallel_residual: bool = option(
        False, "Attention and feed-forward read the same state, each by its norm, and both are added (GPT-NeoX)."
    )
    query_key_norm: bool = option(False, "Normalize each query and key head before positions enter (Qwen3).")
    final_norm: bool = option(True, "Normalize a pre-norm stack's output.")

    position: str = option(
        "learned",
        "How positions enter: added to embeddings, rotating queries and keys, biasing scores, or not at all.",
        choices=("learned", "sinusoidal", "rotary", "relative", "none"),
    )
    position_offset: int = option(0, "Rows of the learned table before that of position 0 (RoBERTa: 2).", low=0)
    rotary_base: float = option(10000.0, "Base of the rotary frequencies.", low=1)
    rotary_fraction: float = option(1.0, "Part of a head's width that is rotated (GPT-NeoX: 0.25).", low=0, high=1)
    rotary_scaling: RotaryScaling = section(RotaryScaling, "Reach beyond the length of pre-training.")
    relative_buckets: int = option(32, "Buckets of T5's relative bias.", low=2)
    relative_max_distance: int = option(128, "Distance from which all positions share the last bucket.", low=2)

    attention_scale: str = option(
        "rsqrt", "Scores times 1/sqrt(head_dim), or as they are (T5).", choices=("rsqrt", "none")
    )
    attention_windows: tuple[int, ...] = option(
        (0,), "Window of attention in tokens, cycled over the layers; 0 is dense. GPT-3: (0, 128)."
    )
    activation: str = option(
        "gelu",
        "Feed-forward: relu, gelu (exact), gelu_tanh, silu, or gated geglu, swiglu.",
        choices=("relu", "gelu", "gelu_tanh", "silu", "geglu", "swiglu"),
    )
    experts: Experts = section(Experts, "Sparse layers.")
    lora: Lora = section(Lora, "Adapters for fine-tuning.")

    num_token_types: int = option(0, "Rows of the token-type (segment) table; 0: none.", low=0)
    embedding_norm: bool = option(False, "Normalize the sum of embeddings (BERT).")
    scale_embeddings: bool = option(False, "Multiply token embeddings by sqrt(embed_dim) (Vaswani, section 3.4).")
    tie_embeddings: bool = option(True, "The output layer is the transposed token table.")
    scale_logits: bool = option(False, "Multiply hidden states by 1/sqrt(embed_dim) before the tied table (T5).")
    num_classes: int = option(2, "Outputs of the classification head; 1 for regression.", low=1)
    pooling: str = option(
        "first", "Classification reads the first token, the mean or the last token.", choices=("first", "mean", "last")
    )
    pooler: str = option(
        "tanh",
        "Between pooling and classes: dense and tanh (BERT), dense and relu (DistilBERT), or nothing (GPT-2).",
        choices=("tanh", "relu", "none"),
    )

    dropout: float = option(0.0, "Dropout of embeddings and of each sub-layer's output.", low=0, high=1)
    attention_dropout: float = option(0.0, "Dropout of attention weights.", low=0, high=1)
    mlp_dropout: float = option(0.0, "Dropout of the feed-forward's hidden layer (T5).", low=0, high=1)
    final_dropout: float = option(0.0, "Dropout after the final norm of a stack (T5).", low=0, high=1)
    head_dropout: float = option(0.0, "Dropout before the classification head's last layer.", low=0, high=1)

    initializer: str = option(
        "normal",
        "normal: stddev init_stddev (BERT, GPT). fan_in: truncated, variance init_scale/fan_in (T5, Switch). "
        "xavier: uniform (Vaswani).",
        choices=("normal", "fan_in", "xavier"),
    )
    init_stddev: float = option(0.02, "Standard deviation of the normal initializer.", low=0)
    init_scale: float = option(1.0, "Scale of the fan_in initializer (Switch: 0.1).", low=0)
    embedding_stddev: float = option(0.02, "Standard deviation of token and learned position embeddings.", low=0)
    scale_residual_init: bool = option(False, "Residual projections divided by sqrt(2 num_layers) (GPT-2).")

    attention: str = option(
        "auto",
        "Form of attention. auto: the fastest for the hardware, which the run says; flash: a fused kernel (cuDNN, "
        "Pallas) or an error that says why not; blockwise: in blocks, on any hardware; plain: the formula.",
        choices=("auto", "flash", "blockwise", "plain"),
    )
    products: str = option(
        "dtype",
        "Numbers that projections and experts multiply. int8, fp8: rounded to eight bits for each product but those "
        "of weights' gradients (needs the extra quantized).",
        choices=("dtype", "int8", "fp8"),
    )
    dtype: str = option("float32", "Compute type; parameters stay float32.", choices=("float32", "bfloat16"))
    scan_layers: bool = option(True, "One compiled layer scanned over stacked parameters, or all unrolled.")
    remat: str = option(
        "none",
        "What backward recomputes: none; full: all of a layer; dots: all but matmul outputs; "
        "dots_no_batch: all but weight matmul outputs.",
        choices=("none", "full", "dots", "dots_no_batch"),
    )


def layer_period(model: Model, decoder: bool = False) -> int:
    """Layers after which a stack repeats itself: what one step of the scan over layers holds.

    Args:
      decoder: of the decoder of an encoder-decoder, rather than of the encoder or the only stack.
    """
    every = _sparse_every(model.experts, decoder) if model.experts.num_experts else 1
    return math.lcm(len(model.attention_windows), every)


def is_sparse(model: Model, index: int, decoder: bool = False) -> bool:
    """Whether the feed-forward of layer ``index``, counted from 0, has experts; ``decoder`` as above."""
    experts, every = model.experts, _sparse_every(model.experts, decoder)
    first = every - 1 if experts.first is None else experts.first
    return experts.num_experts > 0 and index % every == first % every


def _sparse_every(experts: Experts, decoder: bool) -> int:
    return (decoder and experts.decoder_every) or experts.every
