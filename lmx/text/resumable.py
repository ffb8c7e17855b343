"""Grain datasets whose position is small, and whose iterators end cleanly. Importing this module imports Grain."""

import atexit
import multiprocessing
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import grain
from absl import flags

from lmx.errors import DataError

RESTARTS = 3  # of loader workers, without an element between


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
            options = grain.MultiprocessingOptions(num_workers=self._num_workers)
            elements = elements.mp_prefetch(options, worker_init_fn=_end_with_parent)
        return iter(elements)


class _FromIndexIterator(grain.DatasetIterator):
    """Starts its threads or processes when first asked for an element, and anew after ``set_state``.

    An element is a function of its index. So when a worker process is killed (by the system, for memory, most often),
    all of them are started again at the element that is due, and nothing is lost or changed.
    """

    def __init__(self, start: Callable[[int], grain.DatasetIterator]):
        super().__init__()
        self._start = start
        self._next_index, self._elements, self._restarts = 0, None, 0

    def __next__(self) -> Any:
        while True:
            if self._elements is None:
                self._elements = self._start(self._next_index)
            try:
                element = next(self._elements)
            except RuntimeError as error:
                self._restart(error)
                continue
            self._next_index, self._restarts = self._next_index + 1, 0
            return element

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._next_index}

    def set_state(self, state: dict[str, int]) -> None:
        self._stop()
        self._next_index = state["next_index"]

    def close(self) -> None:
        self._stop()
        super().close()

    def _restart(self, error: RuntimeError) -> None:
        """Gets ready to start again where it was, if the error is that of a worker that died."""
        if "terminated unexpectedly" not in str(error):
            raise error
        if self._restarts == RESTARTS:
            raise DataError(
                f"a loader worker died {RESTARTS + 1} times at element {self._next_index:,} ({error}). If that was for "
                "want of memory, lower data.num_workers; data.num_workers=0 loads without such processes."
            ) from error
        self._restarts += 1
        print(f"lmx: a loader worker died; starting again at element {self._next_index:,}.", file=sys.stderr)
        self._stop()

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


def _end_with_parent(*_: Any) -> None:
    """In a worker: ends it when the process it works for is gone, which a killed one has no time to see to."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@atexit.register
def _close_all() -> None:
    for iterator in list(ClosedAtExit._open):
        iterator.close()
