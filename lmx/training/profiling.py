"""A trace of a few steps, and which operations cost most, by the model's own names.

The trace opens in TensorBoard (its profile plugin) and, the ``.trace.json.gz`` beside it, in Perfetto.
"""

import collections
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from lmx.parallel.compile import CompiledStep

FOLDER = "profile"
WARM, STEPS = 5, 3  # steps before the trace, in which programs are compiled and memory is found, and in it
SHOWN = 10

_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*?metadata=\{[^}]*?op_name="([^"]*)"', re.MULTILINE)
_FUNCTION = re.compile(r"^(?:jit|pjit|custom_\w+)\(.*\)$")  # with the name of a function of JAX or of the step
_TRANSFORMED = re.compile(r"^(?:transpose|jvp|vmap|remat|checkpoint)\((.*)\)$")
_PLUMBING = {"", "while", "body", "cond", "closed_call", "branch_0_fun", "branch_1_fun", "shard_map", "scan", "remat"}
_PLUMBING |= {"checkpoint", "rematted_computation", "eval_jaxpr", "custom_jvp_call", "custom_vjp_call"}


class Profiler:
    """A train step that traces :data:`STEPS` of its calls, once it is warm, and prints what they show.

    Args:
      step: the compiled step.
      folder: where the trace goes.
      console: where the operations are printed.
    """

    def __init__(self, step: CompiledStep, folder: Path, console: Console):
        self._step, self._folder, self._console = step, folder, console
        self._calls, self._tracing = 0, False

    def __call__(self, state: Any, batch: Mapping[str, jax.Array]) -> Any:
        """One step."""
        if self._calls == WARM:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        self._calls += 1
        state, metrics = self._step(state, batch)
        if self._calls == WARM + STEPS:
            jax.block_until_ready(state)
            self._stop()
            # Compiled once more, for its text; the cache of compiled programs has it.
            self._print(self._step.lower(state, batch).compile().as_text())
        return state, metrics

    def close(self) -> None:
        """Ends a trace that is not finished; says so."""
        if self._tracing:
            self._stop()
        if self._calls < WARM + STEPS:
            self._console.print(
                f"[yellow]no profile[/]: it is of {STEPS} steps after the first {WARM}, and the run ended before.",
                highlight=False,
            )

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()

    def _print(self, program: str) -> None:
        costs = operation_costs(newest_trace(self._folder), program)
        total = sum(costs.values())
        self._console.print(f"[bold]profile[/] of {STEPS} steps: {self._folder}", highlight=False, soft_wrap=True)
        if not total:
            self._console.print("  the trace tells of no operation of the step", highlight=False, soft_wrap=True)
        for name, seconds in costs.most_common(SHOWN):
            line = f"  {1e3 * seconds / STEPS:9.2f} ms a step  {seconds / total:4.0%}  {name}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def newest_trace(folder: Path) -> Path:
    """The trace that was written last in a folder of them."""
    return max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)


def operation_costs(trace: Path, program: str) -> collections.Counter:
    """Seconds that devices spent in each operation, by its name in the model; several at once count for each.

    Args:
      trace: an ``xplane.pb``.
      program: optimized HLO of what was traced, whose instructions the trace tells of.
    """
    names = dict(_INSTRUCTION.findall(program))
    costs: collections.Counter = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                found = names.get(_instruction(event, names))
                if found is not None:
                    costs[readable(found)] += event.duration_ns / 1e9
    return costs


def _instruction(event: Any, names: Mapping[str, str]) -> str:
    """The HLO instruction of an event: its name, or on a GPU, where that is the kernel's, what stands beside it."""
    name = event.name.lstrip("%").split(" ", 1)[0]
    if name in names:
        return name
    return next((value for key, value in event.stats if key == "hlo_op"), "")


def readable(op_name: str) -> str:
    """``jit(step)/transpose(jvp(Model))/decoder/while/body/layers/mlp/in/dot_general`` as
    ``decoder/layers/mlp/in: dot_general (backward)``."""
    *path, operation = op_name.split("/")
    kept = []
    for part in path:
        while match := _TRANSFORMED.match(part):
            part = match[1]
        if part not in (*_PLUMBING, *kept[-1:]) and "." not in part and not _FUNCTION.match(part):
            kept.append(part)
    backward = " (backward)" if "transpose(" in op_name else ""
    return f"{'/'.join(kept) or 'step'}: {operation}{backward}"
