"""What a family of published checkpoints is: a map between its ``config.json`` and ours, and one table of weights.

Both are used in both directions. A family says nothing else: the model is the one Transformer.
"""

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from lmx.errors import CheckpointError
from lmx.interop.layouts import Weight, adapter_weights
from lmx.model_config import Model
from lmx.models.lora import has_adapter
from lmx.schema import build, check_section, differences

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Field:
    """A key of ``config.json`` that is a field of the schema's ``Model``; ``default`` stands for an absent key."""

    key: str
    field: str
    default: Any = None


@dataclasses.dataclass(frozen=True)
class Head:
    """An architecture of the family.

    Attributes:
      heads: the heads that it has.
      objective: what it is trained for, as :class:`lmx.config.Objective` names it.
    """

    heads: tuple[str, ...]
    objective: str


class Unlike(CheckpointError):
    """A family cannot represent a model, for so many reasons."""

    def __init__(self, message: str, count: int = 1000):
        super().__init__(message)
        self.count = count


class Family(abc.ABC):
    """A family of checkpoints.

    Attributes:
      model_types: values of ``model_type`` in ``config.json``; the first is written.
      architectures: class names of ``transformers``, and what they have.
      fields: keys that are fields of ours.
      fixed: settings that every model of the family has.
      supported: values that a key may have, or be absent; any other cannot be represented.
      prefix: stands before the body's names where there is a head, and is missing in a bare body.
      output: the tensor of the output layer, and the token table that it may be tied to.
      duplicates: other tensors that are copies of one, where a file has them.
      ignored: patterns of names that are not read, and why.
    """

    model_types: ClassVar[tuple[str, ...]]
    architectures: ClassVar[dict[str, Head]]
    fields: ClassVar[tuple[Field, ...]]
    fixed: ClassVar[dict[str, Any]]
    supported: ClassVar[dict[str, tuple]] = {}
    activation_key: ClassVar[str] = "hidden_act"
    prefix: ClassVar[str] = ""
    output: ClassVar[tuple[str, str]]
    duplicates: ClassVar[dict[str, str]] = {}
    ignored: ClassVar[dict[str, str]] = {}

    def model(self, config: Values, heads: Sequence[str]) -> dict[str, Any]:
        """The fields of :class:`lmx.model_config.Model` for a ``config.json``.

        Raises:
          CheckpointError: a value cannot be represented; it names the key.
        """
        for key, values in self.supported.items():
            if config.get(key, values[0]) not in values:
                raise unsupported(key, config[key], values)
        model = dict(self.fixed) | {"heads": tuple(heads)}
        for field in self.fields:
            model[field.field] = config.get(field.key, field.default)
        return model | self.extra_fields(config)

    def config(self, model: Model) -> dict[str, Any]:
        """The ``config.json`` for a model of ours.

        Raises:
          Unlike: the model has settings that the family does not have.
        """
        values = {field.key: getattr(model, field.field) for field in self.fields} | self.extra_keys(model)
        back = build_model(self.model(values, model.heads))
        ours, theirs = meaning(model), meaning(back)
        found = {name: pair for name, pair in differences(ours, theirs).items() if name.split(".")[0] in ours}
        if found:
            settings = "; ".join(f"model.{name} is {mine!r} and not {other!r}" for name, (mine, other) in found.items())
            raise Unlike(f"it is not {self.model_types[0]!r}, because {settings}", len(found))
        return values

    def extra_fields(self, config: Values) -> dict[str, Any]:
        """Fields that are more than one key each."""
        return {}

    def extra_keys(self, model: Model) -> dict[str, Any]:
        """The keys of :meth:`extra_fields`."""
        return {}

    @abc.abstractmethod
    def weights(self, model: Model) -> Iterator[Weight]:
        """The table: every parameter that a model of the family may have, and more."""

    def table(self, model: Model) -> Iterator[Weight]:
        """:meth:`weights`, with the low-rank adapters that the model has."""
        for weight in self.weights(model):
            yield weight
            if weight.ours.endswith("/kernel") and has_adapter(model, weight.ours.split("/")[:-1]):
                yield from adapter_weights(weight)

    def copies(self, model: Model) -> dict[str, str]:
        """Tensors that are copies of others, where a file has them."""
        return self.duplicates | (dict([self.output]) if model.tie_embeddings else {})


# How a model is computed, initialized or trained, not what it computes; a file need not say it.
FREE = (
    *("attention", "products", "dtype", "remat", "scan_layers", "num_classes", "use_bias"),
    *("initializer", "init_stddev", "init_scale", "embedding_stddev", "scale_residual_init"),
    *("dropout", "attention_dropout", "mlp_dropout", "final_dropout", "head_dropout"),
)


def meaning(model: Model) -> dict[str, Any]:
    """What a model computes: its settings with defaults resolved, without those that say nothing here."""
    windows, biases = model.attention_windows, "all" if model.use_bias else "none"
    two = model.architecture == "encoder_decoder"
    resolved = {
        "head_dim": model.head_dim or model.embed_dim // model.num_heads,
        "num_kv_heads": model.num_kv_heads or model.num_heads,
        "num_decoder_layers": (model.num_decoder_layers or model.num_layers) if two else None,
        "attention_bias": model.attention_bias or biases,
        "mlp_bias": model.use_bias if model.mlp_bias is None else model.mlp_bias,
        "norm_bias": model.use_bias and model.norm == "layernorm",
        "attention_windows": tuple(windows[i % len(windows)] for i in range(model.num_layers)),
    }
    silent = [
        *FREE,
        *(("position_offset", "max_length") if model.position != "learned" else ()),
        *(("rotary_base", "rotary_fraction", "rotary_scaling") if model.position != "rotary" else ()),
        *(("relative_buckets", "relative_max_distance") if model.position != "relative" else ()),
        *(() if {"classification", "pooler"} & set(model.heads) else ("pooling", "pooler")),
        *(() if model.experts.num_experts else ("experts",)),
        *(() if model.lora.rank else ("lora",)),
        *(() if model.norm_position == "pre" else ("final_norm",)),
    ]
    return {name: value for name, value in (dataclasses.asdict(model) | resolved).items() if name not in silent}


def build_model(fields: Values) -> Model:
    """The section from plain values; None takes the default."""
    model = build(Model, {name: value for name, value in fields.items() if value is not None})
    check_section(model, "model.")
    return model


ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def activation_of(key: str, name: str) -> str:
    """Our name of an activation; a CheckpointError for one that we lack."""
    if name not in ACTIVATIONS:
        raise unsupported(key, name, tuple(ACTIVATIONS))
    return ACTIVATIONS[name]


def activation_name(activation: str) -> str:
    """The inverse of :func:`activation_of`."""
    name = next((theirs for theirs, ours in ACTIVATIONS.items() if ours == activation), None)
    if name is None:
        raise Unlike(f"it has model.activation={activation!r}")
    return name


def unsupported(key: str, value: Any, values: Sequence[Any]) -> CheckpointError:
    """The error for a ``config.json`` that asks for what there is not."""
    known = ", ".join(map(repr, values))
    return CheckpointError(f"{key}={value!r} of config.json is not supported; known: {known}.")


def dense(ours: str, theirs: str, kernel: str = "out in -> in out", bias: str = "", part: int = 0) -> Iterator[Weight]:
    """Weight and bias of a linear layer; PyTorch's is [outputs, inputs]."""
    yield Weight(f"{ours}/kernel", f"{theirs}.weight", kernel, part)
    yield Weight(f"{ours}/bias", f"{theirs}.bias", bias, part)


def norm(ours: str, theirs: str) -> Iterator[Weight]:
    """Scale and bias of a norm."""
    yield Weight(f"{ours}/scale", f"{theirs}.weight")
    yield Weight(f"{ours}/bias", f"{theirs}.bias")


def attention(ours: str, query: str, key: str, value: str, out: str) -> Iterator[Weight]:
    """Four projections, each a tensor of its own."""
    for name, theirs, heads in (("query", query, "heads"), ("key", key, "kv_heads"), ("value", value, "kv_heads")):
        split = f"({heads} head_dim)"
        kernel = f"{split} embed -> embed {heads} head_dim"
        yield from dense(f"{ours}/{name}", theirs, kernel, f"{split} -> {heads} head_dim")
    yield from dense(f"{ours}/out", out, "embed (heads head_dim) -> heads head_dim embed")
