"""What every objective offers: a host part that makes examples and a device part that scores them.

The host part turns a row of tokens (or a record) into an example with NumPy; the device part is pure JAX.
An objective holds no parameters. All its randomness comes in as a generator, so an example is a pure
function of (seed, index).
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lmx.config import Config
from lmx.errors import ConfigError, DataError
from lmx.kernels.linear_cross_entropy import Unembedding, linear_cross_entropy
from lmx.text.packing import Cut
from lmx.text.tokenizers import Tokenizer

Batch = Mapping[str, Array]
Example = dict[str, np.ndarray]
Sample = Callable[[np.random.Generator, int], np.ndarray]
Term = tuple[Array, Array]


class Objective(abc.ABC):
    """What is predicted and how it is scored.

    Attributes:
      cut: how token documents become the rows that :meth:`view` takes; none where it takes records.
      lengths: the length that each array of an example is zero-padded to; scalars are not named.
      packable: several examples of records may share a row.
      dynamic: a row's example is drawn afresh each epoch.
      optimized: the terms whose means sum to the training loss.
      sources: names of the sources of a training mixture, each of which gets a loss of its own; else none.
      num_predictions: positions of a row that get logits; none: all of them.
    """

    cut: Cut | None = None
    lengths: dict[str, int]
    packable: bool = False
    dynamic: bool = False
    optimized: tuple[str, ...] = ("loss",)
    sources: tuple[str, ...] = ()
    num_predictions: int | None = None

    @abc.abstractmethod
    def view(self, row: Mapping[str, Any], rng: np.random.Generator, sample: Sample | None) -> Example:
        """An example: 1-D arrays no longer than ``lengths`` says, and scalars.

        Args:
          row: ``tokens``, ``segments`` and ``positions`` of a row made by ``cut``, or a record of the source.
          rng: the only source of randomness.
          sample: ``sample(rng, length)`` draws a window of tokens from a random place of the corpus; none for records.
        """

    def rows(self, record: Mapping[str, Any]) -> int:
        """Rows that all of a record would fill, one or more; asked where ``data.too_long`` is not "error"."""
        raise NotImplementedError(f"{type(self).__name__} takes no records")

    def by_source(self, sums: Array, weights: Array, sources: Array | None) -> dict[str, Term]:
        """``loss/NAME`` for every source of a training mixture; nothing where there is one source, or in evaluation.

        Args:
          sums: what the loss sums up, unweighted.
          weights: their weights, of the same shape.
          sources: which source each is of, of the same shape.
        """
        if sources is None:
            return {}
        own = {name: weights * (sources == number) for number, name in enumerate(self.sources)}
        return {f"loss/{name}": (jnp.sum(sums * weight), jnp.sum(weight)) for name, weight in own.items()}

    @abc.abstractmethod
    def weights(self, batch: Batch) -> dict[str, Array]:
        """The weight of each optimized term, from the batch alone: what the loop divides the sums by."""

    @abc.abstractmethod
    def terms(self, model: Any, batch: Batch, train: bool = False) -> dict[str, Term]:
        """Every term as ``(sum, weight)``; the optimized ones, and others that are only reported.

        ``model`` is a bound module: ``transformer.apply(variables, batch, train, method=objective.terms)``.
        Label smoothing and z-loss count in training only, so that held-out losses compare between configs.
        """


class TokenObjective(Objective):
    """An objective whose loss is the mean cross-entropy of single tokens.

    Attributes:
      sparse: many of the tokens may weigh nothing, such as those of rows that are shorter than others.
    """

    label_smoothing: float
    z_loss: float
    weights_name = "weights"
    sparse: bool

    def weights(self, batch: Batch) -> dict[str, Array]:
        return {"loss": jnp.sum(batch[self.weights_name])}

    def token_terms(
        self,
        head: Unembedding,
        targets: Int[Array, "batch length"],
        weights: Float[Array, "batch length"],
        train: bool,
        sources: Int[Array, "batch length"] | None = None,
    ) -> tuple[dict[str, Term], Bool[Array, "batch length"]]:
        """``loss`` (nats a token) and ``accuracy`` (fraction of tokens than which no other id is likelier).

        Of a training mixture also the loss of each source. Beside them, which tokens are right.
        """
        smoothing, z_loss = (self.label_smoothing, self.z_loss) if train else (0.0, 0.0)
        with jax.named_scope("cross_entropy"):
            scores = linear_cross_entropy(
                head, targets, weights, label_smoothing=smoothing, z_loss=z_loss, sparse=self.sparse
            )
        weight = jnp.sum(weights)
        terms = {"loss": (scores.loss, weight), "accuracy": (jnp.sum(scores.right * weights), weight)}
        return terms | self.by_source(scores.nll, weights, sources), scores.right


def exact_match(
    right: Bool[Array, "batch length"],
    weights: Float[Array, "batch length"],
    segments: Int[Array, "batch length"],
) -> Term:
    """Teacher-forced: examples with every token right, and how many examples there are.

    An example is a segment of a row in which some target counts, so packed rows score as unpacked ones do.
    """
    wrong = weights * ~right
    per_segment = jax.vmap(lambda values, ids: jax.ops.segment_sum(values, ids, num_segments=values.shape[0] + 1))
    present = per_segment(weights, segments) > 0
    right = present & (per_segment(wrong, segments) == 0)
    return jnp.sum(right, dtype=jnp.float32), jnp.sum(present, dtype=jnp.float32)


def special_id(tokenizer: Tokenizer, names: tuple[str, ...], purpose: str) -> int:
    """The first id among ``names`` that the tokenizer has (``("bos", "eos")``: bos, or else eos).

    Raises:
      ConfigError: it has none of them.
    """
    ids = (getattr(tokenizer, f"{name}_id") for name in names)
    found = next((token for token in ids if token is not None), None)
    if found is None:
        raise ConfigError(
            f"{purpose} needs a tokenizer with a {' or '.join(names)} token, and this one has none; choose another "
            "config.tokenizer."
        )
    return found


def optional_id(token: int | None) -> tuple[int, ...]:
    """The id as a sequence of one, or of none where the tokenizer lacks it."""
    return () if token is None else (token,)


def one_segment(tokens: np.ndarray, prefix: str = "") -> Example:
    """``tokens`` with the ``segments`` (all 1) and ``positions`` of a single document."""
    length = len(tokens)
    return {
        f"{prefix}tokens": np.asarray(tokens, np.int32),
        f"{prefix}segments": np.ones(length, np.int32),
        f"{prefix}positions": np.arange(length, dtype=np.int32),
    }


def text_of(record: Mapping[str, Any], field: str, option: str) -> str:
    """The text in a field of a record (bytes are UTF-8).

    Raises:
      DataError: there is no such field, it holds no text, or bytes that are not UTF-8.
    """
    if field not in record:
        raise DataError(f"a record has no field {field!r} (data.{option}); it has {', '.join(map(repr, record))}.")
    text = record[field]
    if isinstance(text, bytes):
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"field {field!r} (data.{option}) of a record is not UTF-8: {error}.") from error
    if not isinstance(text, str):
        raise DataError(f"field {field!r} (data.{option}) of a record should hold text, not {text!r}.")
    return text


def check_lengths(objective: Objective, config: Config) -> None:
    """Raises :class:`ConfigError` where a row is longer than the learned positions of the model."""
    longest = max(objective.lengths.values())
    if config.model.position == "learned" and longest > config.model.max_length:
        raise ConfigError(
            f"objective {config.objective.name!r} makes rows of {longest} tokens, but model.max_length is "
            f"{config.model.max_length}, the positions that the learned table holds; raise model.max_length or lower "
            "data.length and data.target_length."
        )
