"""Classes of texts or of pairs of texts, or a real number (GLUE: Wang et al. 2019; BERT, section 4.1)."""

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lmx.config import Config
from lmx.errors import ConfigError, DataError
from lmx.kernels.cross_entropy import cross_entropy
from lmx.objectives.base import Batch, Example, Objective, Sample, Term, one_segment, text_of
from lmx.text.lengths import PIECE
from lmx.text.tokenizers import Tokenizer


class Classification(Objective):
    """``[CLS] text [SEP]``, or ``[CLS] first [SEP] second [SEP]`` with token types 0 and 1, and a label.

    The special tokens are those of the tokenizer's ``frame``. A text that is too long is an error, or what
    ``data.too_long`` says: left out; split into pieces that each have the label; or cut, the longer text of a pair
    first, as is usual for classifiers. A label is an index, or a name among ``data.labels``; for regression it
    is a number, and the loss is the squared error.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer):
        data, model = config.data, config.model
        if model.architecture == "encoder_decoder":
            raise ConfigError(
                "objective 'classification' reads one stack: set model.architecture to 'encoder' or 'decoder', or "
                "write labels as text with objective 'seq2seq'."
            )
        self.regression = config.objective.task == "regression"
        self.num_classes, self.labels = model.num_classes, data.labels
        if not self.regression and len(self.labels) > self.num_classes:
            raise ConfigError(
                f"there are {len(self.labels)} labels ({', '.join(self.labels)}) but model.num_classes is "
                f"{self.num_classes}; set model.num_classes={len(self.labels)}."
            )
        self.tokenizer, self.too_long = tokenizer, data.too_long
        self.text_field, self.pair_field, self.label_field = data.text_field, data.pair_field, data.label_field
        num_texts = 2 if data.pair_field else 1
        self.frame = tokenizer.frame(pair=num_texts == 2)
        self.room = data.length - len(self.frame)
        if self.room < num_texts:
            raise ConfigError(f"data.length must be at least {data.length - self.room + num_texts}, not {data.length}.")
        self.num_token_types = model.num_token_types
        self.label_smoothing = config.objective.label_smoothing
        names = ["tokens", "segments", "positions"] + ["token_types"] * (model.num_token_types > 0)
        self.lengths = dict.fromkeys(names, data.length)

    def view(self, record: Mapping[str, Any], rng: np.random.Generator, sample: Sample | None) -> Example:
        if self.label_field not in record:
            raise DataError(
                f"a record has no field {self.label_field!r} (data.label_field); it has {', '.join(map(repr, record))}."
            )
        label = record[self.label_field]
        parts = self._encode(record)
        if self.too_long == "error" and sum(map(len, parts)) > self.room:
            raise DataError(
                f"the record that starts {str(record[self.text_field])[:60]!r} has {sum(map(len, parts))} tokens, more "
                f"than the {self.room} that data.length leaves beside the special ones; raise data.length, or set "
                "data.too_long to 'cut', 'split' or 'drop'."
            )
        if PIECE in record:
            start = record[PIECE] * self.room
            parts = [parts[0][start : start + self.room]]
        return self._example(parts) | {
            "labels": self._number(label) if self.regression else self._class(label),
            "label_weights": np.float32(1),
        }

    def inputs(self, record: Mapping[str, Any]) -> Example:
        """The example without its label: what prediction needs. A long text loses its end."""
        return self._example(self._encode(record))

    def rows(self, record: Mapping[str, Any]) -> int:
        return max(1, -(-sum(map(len, self._encode(record))) // self.room))

    def _encode(self, record: Mapping[str, Any]) -> list[list[int]]:
        texts = [text_of(record, self.text_field, "text_field")]
        if self.pair_field:
            texts.append(text_of(record, self.pair_field, "pair_field"))
        parts = [self.tokenizer.encode(text) for text in texts]
        if not any(parts) and not len(self.frame):
            raise DataError(f"the text of a record is empty and the tokenizer has no special tokens: {record!r}.")
        return parts

    def _example(self, parts: list[list[int]]) -> Example:
        tokens, types = self.frame.around(truncate_longest(parts, self.room))
        example = one_segment(np.array(tokens, np.int32))
        if self.num_token_types:
            example["token_types"] = np.minimum(types, self.num_token_types - 1, dtype=np.int32)
        return example

    def _class(self, label: Any) -> np.int32:
        label = label.decode() if isinstance(label, bytes) else label
        if str(label) in self.labels:
            return np.int32(self.labels.index(str(label)))
        # An index, unless the names are numbers themselves: then a number not among them is no class.
        indexed = isinstance(label, Integral) and not any(name.lstrip("-").isdigit() for name in self.labels)
        if indexed and 0 <= label < self.num_classes:
            return np.int32(label)
        known = f"the labels are {', '.join(self.labels)}" if self.labels else "data.labels names no classes"
        raise DataError(
            f"label {label!r} (field {self.label_field!r}) is neither a name of a class nor an index below "
            f"model.num_classes ({self.num_classes}); {known}."
        )

    def _number(self, label: Any) -> np.float32:
        if isinstance(label, bool) or not isinstance(label, Real) or not np.isfinite(label):
            raise DataError(f"regression needs a finite number in field {self.label_field!r}, not {label!r}.")
        return np.float32(label)

    def weights(self, batch: Batch) -> dict[str, Array]:
        return {"loss": jnp.sum(batch["label_weights"])}

    def terms(self, model: Any, batch: Batch, train: bool = False) -> dict[str, Term]:
        outputs = model.classify(model.hidden(batch, train=train), batch, train=train)
        labels, weights = batch["labels"], batch["label_weights"]
        weight = jnp.sum(weights)
        if self.regression:
            squared_error = jnp.sum(jnp.square(outputs[:, 0] - labels) * weights)
            terms = {"loss": (squared_error, weight), "mse": (squared_error, weight)}
            return terms | self.by_source(jnp.square(outputs[:, 0] - labels), weights, batch.get("label_sources"))
        nll = cross_entropy(outputs, labels, self.label_smoothing if train else 0.0)
        correct = jnp.argmax(outputs, axis=-1) == labels
        terms = {"loss": (jnp.sum(nll * weights), weight), "accuracy": (jnp.sum(correct * weights), weight)}
        return terms | self.by_source(nll, weights, batch.get("label_sources"))


def truncate_longest(parts: list[list[int]], room: int) -> list[list[int]]:
    """Cuts tokens off the end of whichever part is longest (the later of equals) until all fit ``room`` together."""
    sizes = [min(len(part), room) for part in parts]
    while sum(sizes) > room:
        longest = max(range(len(sizes)), key=lambda i: (sizes[i], i))
        sizes[longest] -= 1
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]
