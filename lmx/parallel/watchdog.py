"""A watchdog over a run of several processes: none waits for ever for one that is stuck, and the message names it.

JAX notices a process that has died, or that sends no heartbeat for 100 seconds. It does not notice one that is alive
and stuck (in its input, in a lock, in a file system that hangs): the others then wait in a collective, without end.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax._src import distributed  # the coordination service has no public door

from lmx.parallel.processes import PEER_LOST

FOLDER = "lmx/stalled/"
SILENT = "does not answer"
ANSWER_SECONDS = 30.0  # for the coordination service and what is waited for there


class Watchdog:
    """While open, ends this process when its training stands still. Does nothing in a run of one process.

    A thread of its own looks when the last step began. Once that is too long ago, it tells the others through the
    coordination service of JAX at which step it stands, hears where they stand, and ends the process: whoever is at an
    earlier step than the others, or says nothing, is who they wait for.

    Args:
      seconds: without a step after which a run counts as stuck; 0: never. What rests is not counted (:meth:`rest`).
      workdir: for the message.
      client: the coordination service; for tests.
      end: what ends the process; for tests.
    """

    def __init__(self, seconds: float, workdir: Any, client: Any = None, end: Callable[[int], Any] = os._exit):
        self._seconds, self._workdir, self._end = seconds, workdir, end
        self._client = client or distributed.global_state.client
        self._step, self._since = 0, None
        self._done = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._seconds and self._client is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def beat(self, step: int) -> None:
        """Says that the run is alive, and at which step."""
        self._step, self._since = step, time.monotonic()

    def rest(self) -> None:
        """Stops the clock until the next beat: what comes now may take its time, as compiling does."""
        self._since = None

    def _watch(self) -> None:
        tick = min(1.0, self._seconds / 10)
        last = time.monotonic()
        while not self._done.wait(tick):
            now, since = time.monotonic(), self._since  # read once: the other thread may rest or beat meanwhile
            if now - last > 10 * tick + 1:  # this process itself was stopped: what it missed says nothing
                self._since = since = None if since is None else now
            last = now
            if since is not None and now - since > self._seconds:
                return self._give_up(now - since)

    def _give_up(self, stalled: float) -> None:
        others = _answered(self._ask, min(ANSWER_SECONDS, self._seconds)) or {0: SILENT}
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} did nothing for {stalled:.0f} seconds, "
            f"at step {self._step}. {_blame(others)} Checkpoints are in {self._workdir}; start all processes "
            "again with the same command to go on from the newest.",
            file=sys.stderr,
            flush=True,
        )
        self._end(PEER_LOST)

    def _ask(self) -> dict[int, str]:
        """Where every process says that it stands, by its index: step and host. Waits for those that notice later."""
        mine = f"{self._step} {socket.gethostname()}"
        self._client.key_value_set(f"{FOLDER}{jax.process_index()}", mine, allow_overwrite=True)
        time.sleep(min(10.0, self._seconds / 2))
        said = {int(name.removeprefix(FOLDER)): text for name, text in self._client.key_value_dir_get(FOLDER)}
        return {index: said.get(index, SILENT) for index in range(jax.process_count())}


def _answered(ask: Callable[[], Any], seconds: float) -> Any:
    """What ``ask`` returns; None where it takes longer, or fails: its thread is left behind."""
    found = []

    def run() -> None:
        try:
            found.append(ask())
        except Exception:  # of the runtime's many kinds: the coordinator, which is process 0, is not there
            pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _blame(others: Mapping[int, str]) -> str:
    """Who is waited for, as a sentence."""
    silent = [index for index, said in others.items() if said == SILENT]
    if silent:
        return f"Process {', '.join(map(str, silent))} {SILENT}: stopped, or its machine is."
    steps = {index: int(said.split()[0]) for index, said in others.items()}
    behind = [f"{index} on {others[index].split()[1]}" for index, at in steps.items() if at == min(steps.values())]
    if len(behind) == len(steps):
        return "All processes stand at that step: their devices do not finish it, or do not reach each other."
    return f"Process {', '.join(behind)} is behind, at step {min(steps.values())}: it is waited for."
