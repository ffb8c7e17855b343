"""Examples as the model sees them, and how well rows are filled."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from lmx.config import Config, Mesh
from lmx.errors import ConfigError
from lmx.text.best_fit import PREFIXES
from lmx.text.pipeline import Batch
from lmx.text.tokenizers import Tokenizer
from lmx.training.experiment import Experiment, build

ROLES = ("pad", "bos", "eos", "unk", "mask", "cls", "sep")
UNFINISHED = "\ufffd"  # what bytes of a character decode to before its last one is there


@dataclasses.dataclass(frozen=True)
class Token:
    """A position of a row.

    Attributes:
      text: what it stands for, or the name of a special token.
      segment: the document or example that it belongs to; 0 is padding.
      special: it stands for no text.
      predicted: it has a target that counts.
      target: the text of the target, where it is neither this token nor, as everywhere in the row, the next one.
      prefix: seen by the whole of its segment.
    """

    text: str
    segment: int
    special: bool = False
    predicted: bool = False
    target: str = ""
    prefix: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """One stack's part of a row (``encoder``, ``decoder``, or the empty name), and the label of the row, if any."""

    stack: str
    tokens: tuple[Token, ...]
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Filling:
    """How rows of one stack are filled.

    Attributes:
      stack: as in :class:`Row`.
      rows: that were counted, and ``length``, the positions of each.
      tokens: positions that are no padding.
      predicted: positions with a target that counts; none where this stack has no targets.
      lengths: of all segments, in tokens.
    """

    stack: str
    rows: int
    length: int
    tokens: int
    predicted: int | None
    lengths: np.ndarray

    @property
    def efficiency(self) -> float:
        """The share of positions that are no padding."""
        return self.tokens / (self.rows * self.length)


def open_examples(config: Config, console: Console) -> Experiment:
    """The experiment of a config, on one device however many it asks for: rows are the same on any.

    Raises:
      LmxError: as from training.
    """
    if config.objective.name == "none":
        raise ConfigError("objective.name='none' makes no examples; set another with --config.objective.name=….")
    import jax

    return build(config.replace(mesh=dataclasses.asdict(Mesh())), Path(), console, jax.local_devices()[:1])


def look(experiment: Experiment, num_rows: int, num_batches: int) -> tuple[list[Row], list[Filling]]:
    """The first rows of training, and how the rows of the first batches are filled.

    A finished workdir's rows come in the same order: it follows from the config's seed.
    """
    batches = list(itertools.islice(experiment.train_batches(), num_batches))
    rows = [row for i in range(num_rows) for row in _rows(batches, i, experiment.tokenizer)]
    stacks = [prefix for prefix in PREFIXES if f"{prefix}tokens" in batches[0]]
    return rows, [_filling(prefix, batches) for prefix in stacks]


def _rows(batches: Sequence[Batch], index: int, tokenizer: Tokenizer) -> Iterator[Row]:
    size = len(next(iter(batches[0].values())))
    if index >= size * len(batches):
        return
    row = {name: values[index % size] for name, values in batches[index // size].items()}
    label = f"label {row['labels']:g}" if "labels" in row and row.get("label_weights", 1) else ""
    for prefix in PREFIXES:
        if f"{prefix}tokens" in row:
            yield Row(prefix.rstrip("_"), _tokens(row, prefix, tokenizer), label)


def _tokens(row: Mapping[str, np.ndarray], prefix: str, tokenizer: Tokenizer) -> tuple[Token, ...]:
    ids = row[f"{prefix}tokens"]
    segments = row.get(f"{prefix}segments", np.ones_like(ids))
    targets, weights = row.get(f"{prefix}targets"), row.get(f"{prefix}weights")
    seen = row.get("prefix", np.zeros_like(ids)) if prefix == "" else np.zeros_like(ids)
    counts = np.zeros(len(ids), bool) if weights is None else weights > 0
    told = counts & False if targets is None else counts & (targets != ids)
    following = np.append(ids[1:], -1)
    if 2 * np.count_nonzero(told & (targets == following)) > np.count_nonzero(told):  # each predicts the next
        told &= targets != following
    found = []
    for i, (text, special) in enumerate(_texts(ids, tokenizer)):
        target = (_texts(targets[i : i + 1], tokenizer)[0][0] or UNFINISHED) if told[i] else ""
        found.append(Token(text, int(segments[i]), special, bool(counts[i]), target, bool(seen[i])))
    return tuple(found)


def _texts(ids: np.ndarray, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of each id among those before it, and whether it is special."""
    names = {getattr(tokenizer, f"{role}_id"): f"<{role}>" for role in reversed(ROLES)}
    names |= {token: f"<extra_id_{i}>" for i, token in enumerate(tokenizer.sentinel_ids)}
    found, run, text = [], [], ""
    for token in ids.tolist():
        if token in names or token in tokenizer.special_ids:
            found.append((names.get(token, f"<{token}>"), True))
            run, text = [], ""
            continue
        run.append(token)
        longer = tokenizer.decode(run).rstrip(UNFINISHED)
        found.append((longer[len(text) :] if longer.startswith(text) else longer, False))
        text = longer
        if longer.endswith(("\n", " ")):  # so that a long row is not decoded from its start for every token
            run, text = [], ""
    return found


def _filling(prefix: str, batches: Sequence[Batch]) -> Filling:
    segments = np.concatenate([batch[f"{prefix}segments"] for batch in batches])
    rows, length = segments.shape
    weights = [batch[f"{prefix}weights"] for batch in batches if f"{prefix}weights" in batch]
    numbered = segments + (np.arange(rows) * (segments.max() + 1))[:, None]
    lengths = np.unique(numbered[segments > 0], return_counts=True)[1]
    predicted = int(np.count_nonzero(np.concatenate(weights))) if weights else None
    return Filling(prefix.rstrip("_"), rows, length, int(np.count_nonzero(segments)), predicted, lengths)
