"""The pipeline: from a source to batches, by Grain.

Everything here is a function of (seed, index): which row stands where in which epoch, and what is drawn for it. So
the position in the data is a small state, a run resumes exactly, and the global batch is the same rows in the same
order over any number of hosts.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from lmx.config import Config, Data
from lmx.text.best_fit import EXAMPLES_AT_ONCE, BestFit, Example
from lmx.text.corpora import Source
from lmx.text.lengths import fitted_records
from lmx.text.mixing import Selection, check_epochs, mixing_shares, too_short
from lmx.text.packing import token_store
from lmx.text.tokenizers import Tokenizer

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]
Place = tuple[int, int, int]  # source of the mixture, its row, epoch

PADDING: tuple = ()  # in the place of a Place: a row of zeros
BATCHES_AHEAD = 4


def make_batches(
    source: Source,
    tokenizer: Tokenizer,
    objective: Any,
    config: Config,
    *,
    train: bool,
    seed: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> "grain.DatasetIterator[Batch]":
    """An iterator of batches with ``get_state`` and ``set_state``; the state is a small dict that JSON can hold.

    In training, rows come in a fresh order each epoch (unless ``data.shuffle`` is off), mixed by ``data.mixing``, for
    ever. Otherwise they come in order, each exactly once, and zero rows fill the last batch, so that every host has as
    many batches. Several examples of records share a row if the objective is ``packable`` and ``data.packing`` is on;
    each host then packs the whole stream and takes its rows.

    Training batches of a mixture say for every weight which source it is of: ``sources`` beside ``weights``,
    ``decoder_sources`` beside ``decoder_weights``.

    Args:
      source: where records come from. Hold on to it between calls: its tokens are remembered with it.
      tokenizer: makes the ids.
      objective: what turns a row or record into an example: ``cut``, ``view(row, rng, sample)``, ``lengths``,
        ``packable``, ``dynamic``, ``rows`` (see :class:`lmx.objectives.base.Objective`). ``sample`` is None for
        records.
      config: its data section is read.
      train: endless and shuffled, or once and in order.
      seed: of the order and of what ``view`` draws.
      batch_size: rows of a batch on this host.
      process_index, process_count: this host among all. Host p has rows p * batch_size to (p + 1) * batch_size of
        each global batch of process_count * batch_size rows.

    Raises:
      DataError: the source has no tokens, its weights do not fit ``data.mixing``, it is too short for
        ``data.max_epochs``, or a record does not suit the objective; the last two also from ``next``.
    """
    import grain

    from lmx.text.resumable import ClosedAtExit, FromIndex

    examples = _Examples.of(source, tokenizer, objective, config, seed, tell_sources=train)
    layout = _Layout.of(examples((0, 0, 0)), objective.lengths)
    num_workers, packing = config.data.num_workers, objective.packable and config.data.packing
    rows = batch_size * process_count
    if train:
        shares = mixing_shares(source, examples.counts, config.data)
        if config.data.max_epochs and not packing:
            check_epochs(source, examples.counts, shares, config.train.steps * rows, config.data.max_epochs)
        places = _endless_places(source, examples.counts, shares, config.data, seed)
    else:
        num_examples = sum(examples.counts)
        fill = 0 if packing else -num_examples % rows
        places = grain.MapDataset.range(num_examples + fill).map(_InOrder(examples.counts))
    stream = places.map(examples)
    if packing:
        batches = _packed(stream, layout, num_workers, rows, process_index, process_count)
        if train:
            batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=BATCHES_AHEAD)
    else:
        # An endless stream has no remainder, and Grain cannot count its batches of one row if there might be one.
        batches = stream.batch(batch_size, drop_remainder=train, batch_fn=layout.stack)[process_index::process_count]
        batches = FromIndex(batches, num_workers, read_ahead=BATCHES_AHEAD)
    return ClosedAtExit(iter(batches))


def example_counts(source: Source, tokenizer: Tokenizer, objective: Any, config: Config) -> tuple[int, ...]:
    """Examples of each source of a mixture, or of the one source, in an epoch: what ``data.mixing`` goes by."""
    return _Examples.of(source, tokenizer, objective, config, config.seed, tell_sources=False).counts


def _packed(
    examples: "grain.MapDataset", layout: "_Layout", num_workers: int, rows: int, process_index: int, process_count: int
) -> "grain.IterDataset":
    """This host's part of batches of ``rows`` rows, each with as many examples as best fit finds room for."""
    import grain

    from lmx.text.resumable import Flat, FromIndex

    lists = examples.batch(EXAMPLES_AT_ONCE, batch_fn=BestFit(layout.lengths))
    packed = grain.experimental.FlatMapIterDataset(FromIndex(lists, num_workers, read_ahead=0), Flat())
    share = rows // process_count
    own = _HostRows(layout, process_index * share, (process_index + 1) * share, rows)
    return packed.batch(rows, batch_fn=own)


def _endless_places(
    source: Source, counts: Sequence[int], shares: Sequence[Fraction], data: Data, seed: int
) -> "grain.MapDataset[Place]":
    """The places of all training rows: each source in a fresh order each epoch, mixed by their shares."""
    import grain

    parts = []
    for part, count in enumerate(counts):
        rows = grain.MapDataset.range(count)
        if data.shuffle:  # Grain adds the epoch to the seed; hashed, so that seeds 0 and 1 share no order
            rows = rows.shuffle(seed=int(np.random.SeedSequence((seed, part)).generate_state(1)[0]))
        parts.append(rows.repeat().map_with_index(_Epochs(part, count, source.sources[part].spec, data.max_epochs)))
    return parts[0] if len(parts) == 1 else grain.MapDataset.select_from_datasets(parts, Selection.of(shares))


# Callables with fields rather than closures, so that worker processes can be sent them.


@dataclasses.dataclass(frozen=True)
class _Epochs:
    """The place of a row, from its index in the endless stream of one source."""

    part: int
    count: int
    spec: str
    max_epochs: int

    def __call__(self, index: int, row: int) -> Place:
        if self.max_epochs and index >= self.count * self.max_epochs:
            raise too_short(self.spec, self.count, self.max_epochs)
        return self.part, int(row), index // self.count


@dataclasses.dataclass(frozen=True)
class _InOrder:
    """The place of the n-th row of all sources one after the other, and PADDING beyond them."""

    counts: tuple[int, ...]

    def __call__(self, index: int) -> Place | tuple[()]:
        for part, count in enumerate(self.counts):
            if index < count:
                return part, int(index), 0
            index -= count
        return PADDING


@dataclasses.dataclass(frozen=True)
class _Examples:
    """The example at a place: the objective's view of a row, with a generator of its own."""

    rows: tuple[Sequence[Any], ...]
    samples: tuple[Callable | None, ...]
    view: Callable[[Any, np.random.Generator, Callable | None], Example]
    dynamic: bool
    tell_sources: bool
    seed: int

    @classmethod
    def of(
        cls, source: Source, tokenizer: Tokenizer, objective: Any, config: Config, seed: int, tell_sources: bool
    ) -> "_Examples":
        """``tell_sources``: where there are several, say which one each weight of an example is of."""
        rows, samples, data = source.sources, (None,) * len(source.sources), config.data
        if objective.cut is not None:
            stores = [token_store(part, tokenizer, data.text_field) for part in source.sources]
            rows, samples = zip(*((store.rows(objective.cut), store.sample) for store in stores), strict=True)
        elif data.too_long != "error":
            rows = tuple(fitted_records(part, objective, data.too_long) for part in source.sources)
        return cls(rows, samples, objective.view, objective.dynamic, tell_sources and len(rows) > 1, seed)

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(map(len, self.rows))

    def __call__(self, place: Place | tuple[()]) -> Example:
        if place == PADDING:
            return {}
        part, row, epoch = place
        rng = np.random.default_rng((self.seed, part, row, epoch if self.dynamic else 0))
        example = self.view(self.rows[part][row], rng, self.samples[part])
        if self.tell_sources:
            weights = {name: value for name, value in example.items() if name.endswith("weights")}
            example = dict(example)
            for name, value in weights.items():
                example[name.replace("weights", "sources")] = np.full(np.shape(value), part, np.int32)
        return example


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The arrays of a batch: their types, and the lengths of those that are not one scalar a row."""

    types: dict[str, np.dtype]
    lengths: dict[str, int]

    @classmethod
    def of(cls, example: Example, lengths: Mapping[str, int]) -> "_Layout":
        """As the first example has them: floats as float32, everything else as int32."""
        kinds = {name: np.asarray(value).dtype.kind for name, value in example.items()}
        types = {name: np.dtype(np.float32 if kind == "f" else np.int32) for name, kind in kinds.items()}
        arrays = [name for name, value in example.items() if np.ndim(value)]
        return cls(types, {name: lengths[name.replace("sources", "weights")] for name in arrays})

    def stack(self, examples: Sequence[Example]) -> Batch:
        """The batch of the examples, each padded with zeros; an empty example is a row of zeros."""
        batch = {}
        for name, kind in self.types.items():
            batch[name] = np.zeros((len(examples), *([self.lengths[name]] if name in self.lengths else [])), kind)
            for row, example in zip(batch[name], examples, strict=True) if name in self.lengths else ():
                if example:
                    row[: len(example[name])] = example[name]
            if name not in self.lengths:
                batch[name][:] = [example[name] if example else 0 for example in examples]
        return batch


@dataclasses.dataclass(frozen=True)
class _HostRows:
    """One host's rows of the packed rows of all hosts, which at the end of the data may be fewer than ``total``."""

    layout: _Layout
    start: int
    stop: int
    total: int

    def __call__(self, rows: Sequence[Example]) -> Batch:
        filled = [*rows, *[{}] * (self.total - len(rows))]
        return self.layout.stack(filled[self.start : self.stop])
