"""The live line of a run, or of tensors on their way, on a terminal; plain lines where there is none."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

PLAIN_SECONDS = 10.0  # between lines where there is no terminal to redraw


class Progress:
    """Shows steps, loss, tokens a second, MFU where the peak is known, and the time left.

    Args:
      console: where to.
      steps: steps in all.
      done: steps done before.
    """

    def __init__(self, console: Console, steps: int, done: int):
        self.console, self.steps = console, steps
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=done, numbers="compiling …")
        self._printed = time.monotonic()

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Moves on to ``step``; with metrics, shows them."""
        if metrics is None:
            self._bar.update(self._task, completed=step)
            return
        self._bar.update(self._task, completed=step, numbers=summary(metrics))
        if not self.console.is_terminal and time.monotonic() - self._printed > PLAIN_SECONDS:
            self._print(f"step {step:>7,} / {self.steps:,}  {summary(metrics)}")

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Prints a line that stays."""
        self._print(f"step {step:>7,} / {self.steps:,}  {summary(metrics)}")

    def _print(self, line: str) -> None:
        self._printed = time.monotonic()
        self.console.print(line, highlight=False, soft_wrap=True)


def tell_reader(console: Console, sentence: str) -> None:
    """Prints what a reader should know although the run goes on."""
    console.print(f"[bold yellow]note:[/] {escape(sentence)}", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def transfer(console: Console, title: str) -> Iterator[Callable[[str, int], None]]:
    """A line for tensors that are read or written: how many, how much, and which is the latest; it stays at the end.

    Yields:
      What to call with the name and the bytes of each tensor.
    """
    what, name = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[name]}"))
    columns = (what, DownloadColumn(), TransferSpeedColumn(), name)
    count = size = 0
    with Bar(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=None, name="")

        def moved(name: str, added: int) -> None:
            nonlocal count, size
            count, size = count + 1, size + added
            bar.update(task, advance=added, name=name)

        yield moved
    if count:
        console.print(f"{title}: {count:,} tensors, {decimal(size)}", highlight=False, markup=False, soft_wrap=True)


def summary(metrics: Mapping[str, float]) -> str:
    """The numbers a person watches, in a line."""
    parts = [
        f"{name.replace('train/', '')} {metrics[name]:.4f}"
        for name in ("train/loss", "eval/loss", "eval/accuracy", "eval/exact_match")
        if name in metrics
    ]
    if "tokens_per_second" in metrics:
        parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    if "model_flops_utilization" in metrics:
        parts.append(f"MFU {metrics['model_flops_utilization']:.1%}")
    return "  ".join(parts)
