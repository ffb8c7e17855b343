"""The schema: one frozen dataclass a section, every field with its meaning and unit where it stands.

A config is data. Experiment files build a :class:`Config` and hand it out as a locked
``ml_collections.ConfigDict`` (:func:`config_dict`); the library turns that back into the dataclasses
(:func:`from_config_dict`), which checks every name, type and range. There is no other place where a
default is written.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict as mlcd

from lmx.errors import ConfigError, nearest


def option(default: Any, meaning: str, *, choices: tuple = (), low: float | None = None, high: float | None = None):
    """A field with its meaning (shown by ``lmx train --help-config``) and what it may hold.

    Args:
      default: the value where none is given.
      meaning: one sentence, with the unit.
      choices: the only values allowed, if not empty.
      low, high: inclusive bounds of a number.
    """
    return dataclasses.field(
        default=default, metadata={"meaning": meaning, "choices": choices, "low": low, "high": high}
    )


def section(cls: type, meaning: str):
    """A nested section, defaulting to that section's own defaults."""
    return dataclasses.field(default_factory=cls, metadata={"meaning": meaning})


@dataclasses.dataclass(frozen=True)
class Experts:
    """Switch layer: sparse feed-forward with top-1 routing (Fedus et al. 2021, section 2)."""

    num_experts: int = option(0, "Experts of a sparse layer; 0 makes every layer dense.", low=0)
    every: int = option(2, "Every n-th layer is sparse: layers n-1, 2n-1, … counted from 0.", low=1)
    capacity_factor: float = option(1.25, "Slots of an expert, as a multiple of an even share, in training.", low=0)
    eval_capacity_factor: float = option(2.0, "The same when evaluating and generating.", low=0)
    load_balance_weight: float = option(0.01, "Weight (alpha) of the load-balance loss, equations 4-6.", low=0)
    z_loss_weight: float = option(0.0, "Weight of the router z-loss (ST-MoE, equation 5).", low=0)
    jitter: float = option(0.01, "Router inputs are multiplied by U(1-jitter, 1+jitter) in training.", low=0, high=1)
    dropout: float = option(0.0, "Dropout inside the experts (the paper's expert dropout).", low=0, high=1)


@dataclasses.dataclass(frozen=True)
class Model:
    """The one Transformer. Every system is a setting of these fields."""

    architecture: str = option(
        "decoder",
        "Which stacks there are. A decoder is causal; with objective prefix_lm its prefix is bidirectional.",
        choices=("encoder", "decoder", "encoder_decoder"),
    )
    heads: tuple[str, ...] = option(
        ("lm",), "Output heads; each needs its own parameters.", choices=("lm", "mlm", "classification", "span")
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
    final_norm: bool = option(True, "Normalize a pre-norm stack's output.")

    position: str = option(
        "learned",
        "How positions enter: added to embeddings, rotating queries and keys, biasing scores, or not at all.",
        choices=("learned", "sinusoidal", "rotary", "relative", "none"),
    )
    rotary_base: float = option(10000.0, "Base of the rotary frequencies.", low=1)
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

    num_token_types: int = option(0, "Rows of the token-type (segment) table; 0: none.", low=0)
    embedding_norm: bool = option(False, "Normalize the sum of embeddings (BERT).")
    scale_embeddings: bool = option(False, "Multiply token embeddings by sqrt(embed_dim) (Vaswani, section 3.4).")
    tie_embeddings: bool = option(True, "The output layer is the transposed token table.")
    scale_logits: bool = option(False, "Multiply hidden states by 1/sqrt(embed_dim) before the tied table (T5).")
    num_classes: int = option(2, "Outputs of the classification head; 1 for regression.", low=1)
    pooling: str = option("first", "Classification reads the first token or the mean.", choices=("first", "mean"))

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
        "The objective.",
        choices=("mlm", "causal", "prefix_lm", "span_corruption", "seq2seq", "classification"),
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
    """Which text, cut and batched how. Sources: builtin:NAME, text:GLOB, jsonl:FILE, tfds:NAME, each with an
    optional slice as in TFDS (``[:90%]``), or a weighted mixture ``0.7*SOURCE + 0.3*SOURCE``."""

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
        "file (tokenizer.json or vocab.txt).",
        choices=("bytes", "characters", "sentencepiece", "file"),
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
    init_from: str = option("", "Workdir to start from; its heads are not taken over where shapes differ.")
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
    generate: bool = option(False, "seq2seq: `lmx eval` also decodes and reports exact match.")


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
        _check_section(self, "")
        _check_together(self)

    def replace(self, **sections: Mapping[str, Any] | Any) -> "Config":
        """A copy with fields changed: ``config.replace(train={"steps": 5}, seed=1)``."""
        return from_dict(_merge(to_dict(self), sections))


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested plain dicts (tuples become lists, as JSON has it)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: Mapping[str, Any]) -> Config:
    """Builds and checks a :class:`Config` from nested dicts; raises :class:`ConfigError` for a bad field."""
    return _build(Config, values, "")


def config_dict(config: Config) -> mlcd.ConfigDict:
    """The config as the locked ``ConfigDict`` that experiment files return and flags override."""
    return mlcd.ConfigDict(_placeholders(config)).lock()


def from_config_dict(values: mlcd.ConfigDict | Config) -> Config:
    """The inverse of :func:`config_dict`."""
    return values if isinstance(values, Config) else from_dict(values.to_dict())


def field_types(cls: type = Config, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every leaf field of the schema by its dotted name."""
    leaves = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            leaves |= field_types(field.type, f"{prefix}{field.name}.")
        else:
            leaves[prefix + field.name] = field
    return leaves


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The leaves in which two nested dicts differ, by dotted name; a leaf one lacks counts as None."""
    found = {}
    for name in sorted({*a, *b}):
        left, right = a.get(name), b.get(name)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found |= differences(left, right, f"{prefix}{name}.")
        elif left != right:
            found[prefix + name] = (left, right)
    return found


def _merge(base: dict, changes: Mapping[str, Any]) -> dict:
    merged = dict(base)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(value, Mapping) and isinstance(old, dict) else value
    return merged


def _placeholders(node: Any) -> dict[str, Any]:
    values = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            value = _placeholders(value)
        elif value is None:  # a typed hole, so that a flag may fill it
            value = mlcd.placeholder(next(t for t in typing.get_args(field.type) if t is not types.NoneType))
        values[field.name] = value
    return values


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(f"config has no field {prefix + name!r}{nearest(prefix + name, _known_names())}")
        if dataclasses.is_dataclass(fields[name].type):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix}{name} is a section with fields of its own, not {value!r}")
            value = _build(fields[name].type, value, f"{prefix}{name}.")
        elif isinstance(value, list):
            value = tuple(value)
        arguments[name] = value
    return cls(**arguments)


def _known_names() -> list[str]:
    return [*field_types(), *(field.name for field in dataclasses.fields(Config))]


def _check_section(node: Any, prefix: str) -> None:
    for field in dataclasses.fields(node):
        name, value = prefix + field.name, getattr(node, field.name)
        if dataclasses.is_dataclass(field.type):
            if not isinstance(value, field.type):
                raise ConfigError(f"{name} must be a {field.type.__name__} section, not {value!r}")
            _check_section(value, f"{name}.")
        else:
            object.__setattr__(node, field.name, _checked(name, field, value))


def _checked(name: str, field: dataclasses.Field, value: Any) -> Any:
    """The value, with an int where a float is meant made a float; an error where it does not fit."""
    kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    if value is None and types.NoneType in kinds:
        return None
    kind = kinds[0]
    if kind is float and type(value) is int:
        value = float(value)
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        elements = (
            tuple(float(v) if element is float and type(v) is int else v for v in value)
            if isinstance(value, (tuple, list))
            else (value,)
        )
        if not isinstance(value, (tuple, list)) or any(type(v) is not element for v in elements):
            raise ConfigError(
                f"{name} must be a tuple of {element.__name__}, not {value!r}. {field.metadata['meaning']}"
            )
        value = elements
    elif type(value) is not kind:
        raise ConfigError(
            f"{name} must be {kind.__name__}, not {value!r} ({type(value).__name__}). {field.metadata['meaning']}"
        )
    low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
    for item in value if isinstance(value, tuple) else (value,):
        if choices and item not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {item!r}{nearest(str(item), choices)}")
        if (low is not None and item < low) or (high is not None and item > high):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ConfigError(f"{name} must be {bounds}, not {item!r}. {field.metadata['meaning']}")
    return value


def _check_together(config: Config) -> None:
    """Checks that fields agree with each other; everything that needs no files and no devices."""
    model, objective, data, train = config.model, config.objective, config.data, config.train

    def require(fits: bool, message: str) -> None:
        if not fits:
            raise ConfigError(message)

    require(
        model.head_dim is not None or model.embed_dim % model.num_heads == 0,
        f"model.embed_dim ({model.embed_dim}) is not divisible by model.num_heads ({model.num_heads}); change one of "
        "them, or set model.head_dim.",
    )
    kv_heads = model.num_kv_heads or model.num_heads
    require(
        model.num_heads % kv_heads == 0,
        f"model.num_heads ({model.num_heads}) is not a multiple of model.num_kv_heads ({kv_heads}); each key/value head "
        "serves the same number of query heads.",
    )
    head_dim = model.head_dim or model.embed_dim // model.num_heads
    require(
        model.position != "rotary" or head_dim % 2 == 0,
        f"rotary positions rotate pairs, so the width of a head must be even, not {head_dim}; change model.embed_dim, "
        "model.num_heads or model.head_dim.",
    )
    require(
        model.position != "sinusoidal" or model.embed_dim % 2 == 0,
        f"sinusoidal positions need an even model.embed_dim, not {model.embed_dim}.",
    )
    require(len(model.attention_windows) > 0, "model.attention_windows is empty; (0,) is dense attention everywhere.")
    require(
        all(w >= 0 for w in model.attention_windows), "model.attention_windows holds a negative window; 0 is dense."
    )
    period = layer_period(model)
    for name in ("num_layers", "num_decoder_layers"):
        layers = getattr(model, name)
        require(
            not model.scan_layers or layers is None or layers % period == 0,
            f"model.{name} ({layers}) is not a multiple of {period}, the period in which layers alternate "
            "(model.attention_windows, model.experts.every); change it, or set model.scan_layers=False.",
        )
    require(
        len(objective.mask_split) == 3 and abs(sum(objective.mask_split) - 1) < 1e-6 and min(objective.mask_split) >= 0,
        f"objective.mask_split must be three parts that sum to 1, not {objective.mask_split}.",
    )
    needs = {
        "mlm": ("encoder", "mlm"),
        "causal": ("decoder", "lm"),
        "prefix_lm": ("decoder", "lm"),
        "span_corruption": ("encoder_decoder", "lm"),
        "seq2seq": ("encoder_decoder", "lm"),
        "classification": (model.architecture, "classification"),
    }
    architecture, head = needs[objective.name]
    require(
        model.architecture == architecture,
        f"objective {objective.name!r} needs model.architecture={architecture!r}, not {model.architecture!r}.",
    )
    require(head in model.heads, f"objective {objective.name!r} needs {head!r} in model.heads, not {model.heads}.")
    if objective.name == "mlm" and objective.next_sentence:
        require(
            "classification" in model.heads and model.num_classes == 2 and model.num_token_types >= 2,
            "objective.next_sentence needs 'classification' in model.heads, model.num_classes=2 and "
            f"model.num_token_types=2; found {model.heads}, {model.num_classes} and {model.num_token_types}.",
        )
    if objective.name == "classification" and objective.task == "regression":
        require(model.num_classes == 1, f"regression needs model.num_classes=1, not {model.num_classes}.")
    if objective.name == "classification" and data.pair_field:
        require(
            model.num_token_types in (0, 2),
            f"pairs (data.pair_field) need model.num_token_types 2 or 0, not {model.num_token_types}.",
        )
    if model.position == "learned":
        require(
            data.length <= model.max_length,
            f"data.length ({data.length}) is more than model.max_length ({model.max_length}), the positions that the "
            "learned table holds.",
        )
    require(
        list(dataclasses.asdict(config.mesh).values()).count(-1) <= 1,
        f"only one axis of config.mesh may be -1 (what is left): {dataclasses.asdict(config.mesh)}.",
    )
    require(0 not in dataclasses.asdict(config.mesh).values(), "an axis of config.mesh is 0; the smallest size is 1.")
    optimizer = config.optimizer
    last = optimizer.decay_steps or train.steps
    require(
        optimizer.schedule not in ("linear", "cosine", "wsd") or optimizer.warmup_steps < last,
        f"optimizer.warmup_steps ({optimizer.warmup_steps}) leaves nothing of the {last} steps; lower it or raise train.steps.",
    )


def layer_period(model: Model) -> int:
    """Layers after which the stack repeats itself: what one step of the scan over layers holds."""
    windows = len(model.attention_windows)
    sparse = model.experts.every if model.experts.num_experts else 1
    return windows * sparse // _gcd(windows, sparse)


def _gcd(a: int, b: int) -> int:
    return a if b == 0 else _gcd(b, a % b)
