"""The parts of a job over several processes of this machine."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lmx.errors import DataError

# (function, job, arguments of each call beside the job, called after each)
Calls = Callable[[Callable[..., Any], Any, Sequence[tuple], Callable[[], None]], None]


@contextlib.contextmanager
def processes(count: int) -> Iterator[Calls]:
    """Gives what calls ``function(job, *arguments)`` for each of the arguments, in any order.

    Args:
      count: 1 is this process alone.

    Raises:
      DataError: what the function raised, or that a process died.
    """
    if count == 1:
        yield _one_by_one
        return
    # Spawned: a fork of a process with threads (of the progress bar, of libraries) may hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(count, context, initializer=_start) as pool:

        def call(function: Callable[..., Any], job: Any, arguments: Sequence[tuple], advance: Callable[[], None]):
            futures = [pool.submit(function, job, *each) for each in arguments]
            for future in concurrent.futures.as_completed(futures):
                future.result()
                advance()

        try:
            yield call
        except concurrent.futures.process.BrokenProcessPool:
            raise DataError(
                "a process of the preparation died, of want of memory more likely than not; run the same command again "
                "to go on, with fewer --processes."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _one_by_one(function: Callable[..., Any], job: Any, arguments: Sequence[tuple], advance: Callable[[], None]):
    for each in arguments:
        function(job, *each)
        advance()


def _start() -> None:
    """A process does one thing at a time, leaves Ctrl-C to its parent, and ends with it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
