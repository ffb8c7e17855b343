"""The schema: one frozen dataclass a section, every field with its meaning and unit where it stands.

A config is data. Experiment files build a :class:`Config` and hand it out as a locked
``ml_collections.ConfigDict`` (:func:`config_dict`); the library turns that back into the dataclasses
(:func:`from_config_dict`), which checks every name, type and range. There is no other place where a
default is written.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict as mlcd

from lmx.config_checks import check_together
from lmx.schema import build, check_section, differences, leaves, merge, option, placeholders, section

__all__ = [
    "Config",
    "Data",
    "Eval",
    "Expect",
    "Experts",
    "Lora",
    "Mesh",
    "Model",
    "Objective",
    "Optimizer",
    "RotaryScaling",
    "Tokenizer",
    "Train",
    "config_dict",
    "differences",
    "field_types",
    "from_config_dict",
    "from_dict",
    "is_sparse",
    "layer_period",
    "to_dict",
]


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


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021): ``W + alpha / rank * A B``, and only A, B and the heads are trained."""

    rank: int = option(0, "Inner width of an adapter; 0: no adapters.", low=0)
    alpha: float = option(16.0, "The product is multiplied by alpha / rank.", low=0)
    targets: tuple[str, ...] = option(
        ("attention/query", "attention/value"),
        "Projections that have one, by the end of their path: attention/query, mlp/in, out, ….",
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
    max_length: int = option(1024, "Positions a learned table holds, and the most tokens generation keeps.", low=1)

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

    dtype: str = option("float32", "Compute type; parameters stay float32.", choices=("float32", "bfloat16"))
    scan_layers: bool = option(True, "One compiled layer scanned over stacked parameters, or all unrolled.")
    remat: str = option(
        "none",
        "What backward recomputes: none; full: all of a layer; dots: all but matmul outputs; "
        "dots_no_batch: all but weight matmul outputs.",
        choices=("none", "full", "dots", "dots_no_batch"),
    )


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is predicted and how it is scored."""

    name: str = option(
        "causal",
        "The objective; none: the model represents text and is not trained.",
        choices=("mlm", "causal", "prefix_lm", "span_corruption", "seq2seq", "classification", "none"),
    )
    mask_rate: float = option(
        0.15, "Fraction of tokens masked (mlm) or in noise spans (span_corruption).", low=0, high=1
    )
    mask_split: tuple[float, ...] = option(
        (0.8, 0.1, 0.1), "Of the chosen tokens: to [MASK], to a random token, kept (BERT). Textbook: (1, 0, 0)."
    )
    dynamic_masks: bool = option(True, "Fresh masks each epoch, or the same ones always.")
    whole_word: bool = option(False, "Mask all pieces of a word together.")
    next_sentence: bool = option(False, "BERT's next-sentence prediction beside mlm.")
    mean_span_length: float = option(3.0, "Mean length of a noise span in tokens (T5).", low=1)
    label_smoothing: float = option(0.0, "Probability spread evenly over the vocabulary in training.", low=0, high=1)
    z_loss: float = option(0.0, "Weight of log(Z)^2 of the softmax in training.", low=0)
    task: str = option("classification", "Classes or one real number.", choices=("classification", "regression"))


@dataclasses.dataclass(frozen=True)
class Data:
    """Which text, cut and batched how. Sources: builtin:NAME, text:GLOB, jsonl:FILE, tfds:NAME@SPLIT (train if not
    named), each with an optional slice as in TFDS (``[:90%]``), or a weighted mixture ``0.7*SOURCE + 0.3*SOURCE``."""

    train: str = option("builtin:python_manual[:90%]", "Training source.")
    eval: str = option("builtin:python_manual[90%:]", "Held-out source.")
    text_field: str = option("text", "Field of a record that holds the text.")
    pair_field: str = option("", "Field of the second text of a pair; empty: single texts.")
    source_field: str = option("source", "Field of the input text (seq2seq).")
    target_field: str = option("target", "Field of the output text (seq2seq).")
    label_field: str = option("label", "Field of the label (classification).")
    labels: tuple[str, ...] = option((), "Names of the classes in order; empty: found in the training data.")
    length: int = option(512, "Tokens of a row; of the encoder's, where there are two stacks.", low=2)
    target_length: int = option(128, "Tokens of a decoder's row (seq2seq; span_corruption works it out).", low=2)
    packing: bool = option(True, "Several documents or examples in a row, without attending across.")
    shuffle: bool = option(True, "Training rows in a fresh random order each epoch.")
    num_workers: int = option(0, "Processes that prepare batches; 0: a thread of this one.", low=0)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """From text to ids."""

    kind: str = option(
        "bytes",
        "bytes, characters (of the training text), sentencepiece (trained on the training text, or a file), "
        "file (tokenizer.json or vocab.txt), published (a folder of a published checkpoint, read as it says).",
        choices=("bytes", "characters", "sentencepiece", "file", "published"),
    )
    path: str = option("", "Tokenizer file or folder; empty: made from the training text.")
    vocab_size: int = option(32000, "Pieces to train, special ones included.", low=8)
    model_type: str = option("unigram", "SentencePiece's algorithm.", choices=("unigram", "bpe"))
    byte_fallback: bool = option(True, "Unknown characters become bytes, so that nothing is lost.")
    num_sentinels: int = option(0, "Sentinel tokens <extra_id_0> … for span corruption (T5: 100).", low=0)
    lowercase: bool = option(False, "Lower-case the text first (vocab.txt and trained vocabularies).")
    training_characters: int = option(50_000_000, "Most characters a trained tokenizer reads.", low=1)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How parameters move."""

    name: str = option(
        "adamw",
        "The update rule.",
        choices=("adamw", "adafactor", "lamb", "lion", "muon", "schedule_free_adamw", "sgd"),
    )
    learning_rate: float = option(3e-4, "Peak learning rate.", low=0)
    schedule: str = option(
        "cosine",
        "Shape after warm-up. wsd: constant, then linear to the end over decay_fraction.",
        choices=("constant", "linear", "cosine", "inverse_sqrt", "wsd"),
    )
    warmup_steps: int = option(100, "Steps of linear warm-up.", low=0)
    end_fraction: float = option(0.1, "Final learning rate as a fraction of the peak.", low=0, high=1)
    decay_fraction: float = option(0.2, "Part of the steps that wsd decays over.", low=0, high=1)
    decay_steps: int | None = option(None, "Step at which the schedule ends; none: train.steps.", low=1)
    b1: float = option(0.9, "Decay of the first moment.", low=0, high=1)
    b2: float = option(0.95, "Decay of the second moment.", low=0, high=1)
    epsilon: float = option(1e-8, "Added to the root of the second moment.", low=0)
    weight_decay: float = option(0.1, "Decoupled weight decay, on matrices only.", low=0)
    clip_norm: float = option(1.0, "Clip gradients to this global norm; 0: never.", low=0)
    ema_decay: float = option(0.0, "Decay of the running mean of parameters used to evaluate; 0: none.", low=0, high=1)
    layer_decay: float = option(
        1.0, "Learning rate times this per layer below the head (ULMFiT; 1: equal).", low=0, high=1
    )
    freeze_body: bool = option(False, "Train the heads alone.")


@dataclasses.dataclass(frozen=True)
class Train:
    """The loop."""

    steps: int = option(1000, "Optimizer steps in all.", low=1)
    global_batch_size: int = option(
        32, "Rows a step, over all devices and micro-batches. Never changes by itself.", low=1
    )
    max_rows_per_device: int | None = option(
        None, "Most rows a device computes at once; more are split into micro-batches.", low=1
    )
    log_every: int = option(10, "Steps between lines of metrics.jsonl.", low=1)
    eval_every: int = option(100, "Steps between evaluations.", low=1)
    checkpoint_every: int = option(500, "Steps between checkpoints.", low=1)
    keep_checkpoints: int = option(2, "Newest checkpoints kept, beside the best.", low=1)
    strategy: str = option("pjit", "How the step is compiled.", choices=("jit", "pmap", "pjit"))
    init_from: str = option(
        "",
        "Workdir, published checkpoint or hub name to start from; heads are not taken over where shapes differ.",
    )
    early_stop_evals: int = option(0, "Stop after so many evaluations without a better eval loss; 0: never.", low=0)
    early_stop_delta: float = option(0.0, "Smallest fall of the eval loss that counts as better.", low=0)
    samples: int = option(2, "Continuations written to samples.txt at each evaluation (decoders).", low=0)
    sample_prompt: str = option("", "Their prompt.")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 (at most once) is what is left."""

    data: int = option(-1, "Batch split, parameters replicated.", low=-1)
    fsdp: int = option(1, "Batch and parameters split.", low=-1)
    tensor: int = option(1, "Heads, feed-forward and vocabulary split.", low=-1)
    sequence: int = option(1, "Length split.", low=-1)
    expert: int = option(1, "Experts split.", low=-1)
    stage: int = option(1, "Layers split into pipeline stages.", low=-1)


@dataclasses.dataclass(frozen=True)
class Eval:
    """Held-out evaluation."""

    batch_size: int | None = option(None, "Rows a batch; none: train.global_batch_size.", low=1)
    max_batches: int = option(0, "Most batches an evaluation reads; 0: all of the held-out data.", low=0)


@dataclasses.dataclass(frozen=True)
class Expect:
    """The claim that the config makes, as data."""

    metric: str = option("eval/loss", "Metric of metrics.jsonl.")
    value: float | None = option(None, "Its expected value at the end; none: no claim.")
    tolerance: float = option(0.05, "Relative difference that still counts as met.", low=0)
    hardware: str = option("", "What it was measured on.")
    minutes: float | None = option(None, "Wall time on that hardware.", low=0)
    source: str = option("", "Paper, table or run that the value comes from.")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole experiment."""

    model: Model = section(Model, "The Transformer.")
    objective: Objective = section(Objective, "What is predicted.")
    data: Data = section(Data, "Which text.")
    tokenizer: Tokenizer = section(Tokenizer, "From text to ids.")
    optimizer: Optimizer = section(Optimizer, "How parameters move.")
    train: Train = section(Train, "The loop.")
    mesh: Mesh = section(Mesh, "The devices.")
    eval: Eval = section(Eval, "Held-out evaluation.")
    expect: Expect = section(Expect, "What should come out.")
    seed: int = option(0, "Seed of everything random: parameters, data order, masks, dropout.", low=0)

    def __post_init__(self):
        check_section(self)
        check_together(self, (layer_period(self.model), layer_period(self.model, decoder=True)))

    def replace(self, **sections: Mapping[str, Any] | Any) -> "Config":
        """A copy with fields changed: ``config.replace(train={"steps": 5}, seed=1)``."""
        return from_dict(merge(to_dict(self), sections))


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested plain dicts (tuples become lists, as JSON has it)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: Mapping[str, Any]) -> Config:
    """Builds and checks a :class:`Config` from nested dicts; raises :class:`ConfigError` for a bad field."""
    return build(Config, values)


def config_dict(config: Config) -> mlcd.ConfigDict:
    """The config as the locked ``ConfigDict`` that experiment files return and flags override."""
    return mlcd.ConfigDict(placeholders(config)).lock()


def from_config_dict(values: mlcd.ConfigDict | Config) -> Config:
    """The inverse of :func:`config_dict`."""
    return values if isinstance(values, Config) else from_dict(values.to_dict())


def field_types() -> dict[str, dataclasses.Field]:
    """Every field of the schema, by its dotted name."""
    return leaves(Config)


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
