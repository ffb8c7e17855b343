"""A Grain dataset whose position is one number. Importing this module imports Grain."""

import atexit
import weakref
from typing import Any

import grain

# Grain's iterators close themselves when they are collected, but not quietly once the interpreter is going down.
_open: "weakref.WeakSet[grain.DatasetIterator]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for iterator in list(_open):
        iterator.close()


def iterate(dataset: grain.IterDataset) -> grain.DatasetIterator:
    """``iter(dataset)``, closed before the interpreter ends."""
    iterator = iter(dataset)
    _open.add(iterator)
    return iterator


class FromIndex(grain.IterDataset):
    """Iterates a ``MapDataset``; the state is the next index alone.

    Grain's own state of a pipeline with worker processes depends on how many there are. This one does not, so a
    run may go on with another ``data.num_workers``.
    """

    def __init__(self, dataset: grain.MapDataset, num_workers: int, read_ahead: int):
        """Args:
        dataset: what to iterate.
        num_workers: processes that make the elements; 0: this one.
        read_ahead: elements that a thread makes before they are asked for; 0: none, and no thread.
        """
        super().__init__()
        self._dataset, self._num_workers, self._read_ahead = dataset, num_workers, read_ahead

    def __iter__(self) -> "FromIndexIterator":
        return FromIndexIterator(self._dataset, self._num_workers, self._read_ahead)


class FromIndexIterator(grain.DatasetIterator):
    """The iterator of :class:`FromIndex`: starts its threads or worker processes when first asked."""

    def __init__(self, dataset: grain.MapDataset, num_workers: int, read_ahead: int):
        super().__init__()
        self._dataset, self._num_workers, self._read_ahead = dataset, num_workers, read_ahead
        self._next_index, self._elements = 0, None

    def __next__(self) -> Any:
        if self._elements is None:
            threads = 1 if self._read_ahead else 0
            options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self._read_ahead)
            elements = self._dataset[self._next_index :].to_iter_dataset(options)
            if self._num_workers:
                elements = elements.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._num_workers))
            self._elements = iter(elements)
        element = next(self._elements)
        self._next_index += 1
        return element

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._next_index}

    def set_state(self, state: dict[str, int]) -> None:
        self._close_elements()
        self._next_index = state["next_index"]

    def close(self) -> None:
        self._close_elements()
        super().close()

    def _close_elements(self) -> None:
        if self._elements is not None:
            self._elements.close()
            self._elements = None
