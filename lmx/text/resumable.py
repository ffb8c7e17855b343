"""Grain datasets whose position is small, and whose iterators end cleanly. Importing this module imports Grain."""

import atexit
import sys
import weakref
from collections.abc import Callable
from typing import Any

import grain
from absl import flags


class FromIndex(grain.IterDataset):
    """Iterates a ``MapDataset``; the state is the next index alone.

    Grain's own state of a pipeline with worker processes depends on how many there are. This one does not, so a
    run may go on with another ``data.num_workers``.
    """

    def __init__(self, dataset: grain.MapDataset, num_workers: int, read_ahead: int):
        """Nothing is read before the first element is asked for.

        Args:
          dataset: what to iterate.
          num_workers: processes that make the elements; 0: this one.
          read_ahead: elements that a thread makes before they are asked for; 0: none, and no thread.
        """
        super().__init__()
        self._dataset, self._num_workers, self._read_ahead = dataset, num_workers, read_ahead

    def __iter__(self) -> grain.DatasetIterator:
        return _FromIndexIterator(self._from)

    def _from(self, index: int) -> grain.DatasetIterator:
        """Grain's iterator over the elements from ``index`` on."""
        threads = 1 if self._read_ahead else 0
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self._read_ahead)
        elements = self._dataset[index:].to_iter_dataset(options)
        if self._num_workers:
            if not flags.FLAGS.is_parsed():  # Grain asks absl for flags of its own before it starts a process
                flags.FLAGS.mark_as_parsed()
            # Batches are small; in shared memory, arrays that live on to the end would be reported as leaks.
            never_shared = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
            elements = grain.experimental.WithOptionsIterDataset(elements, never_shared)
            elements = elements.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._num_workers))
        return iter(elements)


class _FromIndexIterator(grain.DatasetIterator):
    """Starts its threads or processes when first asked for an element, and anew after ``set_state``."""

    def __init__(self, start: Callable[[int], grain.DatasetIterator]):
        super().__init__()
        self._start = start
        self._next_index, self._elements = 0, None

    def __next__(self) -> Any:
        if self._elements is None:
            self._elements = self._start(self._next_index)
        element = next(self._elements)
        self._next_index += 1
        return element

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._next_index}

    def set_state(self, state: dict[str, int]) -> None:
        self._stop()
        self._next_index = state["next_index"]

    def close(self) -> None:
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._elements is not None:
            self._elements.close()
            self._elements = None


class Flat(grain.experimental.FlatMapTransform):
    """Each element of lists, in their order."""

    max_fan_out = sys.maxsize

    def flat_map(self, element: list[Any]) -> list[Any]:
        return element


class ClosedAtExit(grain.DatasetIterator):
    """An iterator that lets go of its threads and processes before the interpreter goes down.

    Grain's own iterators close themselves when they are collected, but fail at it, aloud, when that is too late.
    """

    _open: "weakref.WeakSet[ClosedAtExit]" = weakref.WeakSet()

    def __init__(self, iterator: grain.DatasetIterator):
        super().__init__()
        self._iterator: grain.DatasetIterator | None = iterator
        self._open.add(self)

    def __next__(self) -> Any:
        if self._iterator is None:
            raise ValueError("these batches were closed.")
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)

    def close(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
        super().close()


@atexit.register
def _close_all() -> None:
    for iterator in list(ClosedAtExit._open):
        iterator.close()
