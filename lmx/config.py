"""The schema: one frozen dataclass a section, every field with its meaning and unit where it stands.

A config is data. Experiment files build a :class:`Config` and hand it out as a locked
``ml_collections.ConfigDict`` (:func:`config_dict`); the library turns that back into the dataclasses
(:func:`from_config_dict`), which checks every name, type and range. There is no other place where a
default is written.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict as mlcd

from lmx.config_checks import check_together
from lmx.model_config import Experts, Lora, Model, RotaryScaling, layer_period
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
    "to_dict",
]


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
    """Which text, cut and batched how. Sources: builtin:NAME, text:GLOB, jsonl:FILE, parquet:GLOB, tfds:NAME@SPLIT,
    hf:NAME@SPLIT, task:NAME@SPLIT, prepared:DIR@SPLIT (by ``lmx data prepare``; train if not named), each with an
    optional slice as in TFDS (``[:90%]``), or a mixture, ``0.7*SOURCE + 0.3*SOURCE`` by weight, ``SOURCE + SOURCE`` by
    size."""

    train: str = option(
        "builtin:python_manual[:90%]",
        "Training source: builtin:NAME, text:GLOB, jsonl:FILE, parquet:GLOB, tfds:NAME@SPLIT, hf:NAME@SPLIT, "
        "task:NAME@SPLIT or prepared:DIR@SPLIT, with an optional slice, [:90%]; or a mixture, 0.7*SOURCE + 0.3*SOURCE.",
    )
    eval: str = option(
        "builtin:python_manual[90%:]", "Held-out source; each part of a mixture is scored by itself too."
    )
    mixing: str = option(
        "weights",
        "What a mixture's parts are drawn by: the weights written before them, or in proportion to their examples.",
        choices=("weights", "proportional"),
    )
    mixing_limit: int = option(
        0, "Examples beyond so many do not raise the share of a source (proportional); 0: all of them do.", low=0
    )
    mixing_temperature: float = option(
        1.0, "Shares are raised to the power of 1 / this (proportional): 1 is by size, more is more even.", low=1
    )
    max_epochs: int = option(
        0, "Most times that training goes through a source before it stops with an error; 0: any number.", low=0
    )
    tasks: tuple[str, ...] = option(
        (),
        'Tasks of your own for task:NAME, a JSON object each: {"name": "topic", "source": "jsonl:{split}.jsonl", '
        '"input": "topic: {text}", "target": "{label}"}, and "labels": [...], names for the numbers in label.',
    )
    text_field: str = option("text", "Field of a record that holds the text.")
    pair_field: str = option(
        "", "Field of the second text of a pair; empty: single texts, or the pair that a known tfds: set holds."
    )
    source_field: str = option("source", "Field of the input text (seq2seq).")
    target_field: str = option("target", "Field of the output text (seq2seq).")
    label_field: str = option("label", "Field of the label (classification).")
    labels: tuple[str, ...] = option((), "Names of the classes in order; empty: found in the training data.")
    length: int = option(512, "Tokens of a row; of the encoder's, where there are two stacks.", low=2)
    target_length: int = option(128, "Tokens of a decoder's row (seq2seq; span_corruption works it out).", low=2)
    packing: bool = option(True, "Several documents or examples in a row, without attending across.")
    too_long: str = option(
        "error",
        "Records longer than a row (seq2seq, classification): an error; left out; split into several examples (single "
        "texts); or cut. All but errors are counted and reported. Documents of other objectives are always split.",
        choices=("error", "drop", "split", "cut"),
    )
    shuffle: bool = option(True, "Training rows in a fresh random order each epoch.")
    num_workers: int = option(0, "Processes that prepare batches; 0: a thread of this one.", low=0)
    on_change: str = option(
        "stop",
        "Data files that changed since the run began: stop, or warn and go on; unchecked: no file is hashed.",
        choices=("stop", "warn", "unchecked"),
    )


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
    offload: bool = option(False, "Keep the optimizer's state in the host's memory, away from the devices'.")


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
    on_nan: str = option(
        "stop",
        "A loss or gradient that is not finite: stop the run, or skip the batch, which then changes nothing.",
        choices=("stop", "skip"),
    )
    max_skipped: int = option(10, "Most batches that a run may skip; one more ends it.", low=0)
    stalled_after: float = option(
        1800.0, "Seconds without a step after which one of several processes ends itself; 0: never.", low=0
    )


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 (at most once) is what is left."""

    data: int = option(-1, "Batch split, parameters replicated.", low=-1)
    fsdp: int = option(1, "Batch and parameters split.", low=-1)
    tensor: int = option(1, "Heads, feed-forward and vocabulary split; between sub-layers the length.", low=-1)
    sequence: int = option(1, "Length split, and parameters as by fsdp; each device gathers the keys.", low=-1)
    expert: int = option(1, "Experts split, and the batch; what is not an expert's, as by fsdp.", low=-1)
    stage: int = option(1, "Layers split into pipeline stages.", low=-1)
    stage_microbatches: int | None = option(
        None,
        "Parts of a device's rows under way in a pipeline; none: as many as divide them, up to 4 a stage.",
        low=1,
    )
    stage_rounds: int = option(
        1, "Times that a part goes round the stages: more make the pipeline's idle time shorter.", low=1
    )
    on: tuple[str, ...] = option(
        (), "Sizes for a kind of device, 'v5p: fsdp=-1, tensor=4', or any, where those above are all left as they are."
    )
    rules: tuple[str, ...] = option(
        (), "Other places for logical axes than lmx.parallel.sharding.RULES: 'embed=fsdp', 'residual_length=sequence'."
    )


@dataclasses.dataclass(frozen=True)
class Eval:
    """Held-out evaluation."""

    batch_size: int | None = option(None, "Rows a batch; none: train.global_batch_size.", low=1)
    max_batches: int = option(0, "Most batches an evaluation reads of each held-out source; 0: all.", low=0)


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
