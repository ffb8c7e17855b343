"""A plan for the eye (a table, a page) and for programs (JSON)."""

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lmx.parallel.hardware import GIB
from lmx.parallel.sharding import moved_dimensions
from lmx.planning.plan import Memory, Plan
from lmx.planning.program import boxed_params
from lmx.planning.search import describe
from lmx.training.report import write_page
from lmx.training.workdir import write_text

COLORS = ("--series-0", "--series-1", "--series-2", "--series-3", "--faint", "--grid")
BAR, CELL = 900, 16  # pixels


def rows_of(plan: Plan) -> list[dict]:
    """Every number of a plan, as ``--json`` files hold them: name, value, unit."""
    memory, times, program = plan.memory, plan.times, plan.program
    rows: list[tuple[str, float | None, str]] = [
        (f"parameters/{part}", count, "parameters") for part, count in plan.parameters.items()
    ]
    rows += [
        ("parameters", sum(plan.parameters.values()), "parameters"),
        ("flops_per_token/forward", plan.flops_per_token, "FLOP"),
        ("flops_per_token/train", 3 * plan.flops_per_token, "FLOP"),
        ("devices", program.experiment.mesh.size, "devices"),
        ("global_batch", plan.tokens, "tokens"),
        ("global_batch/rows", plan.config.train.global_batch_size, "rows"),
        ("microbatches", program.experiment.split.microbatches, "micro-batches"),
        ("rows_per_device", program.experiment.split.rows_per_device, "rows"),
        ("compile", program.seconds, "s"),
    ]
    rows += [(f"mesh/{axis}", size, "devices") for axis, size in program.experiment.mesh.shape.items()]
    rows += [(f"memory/{name}", value, "bytes") for name, value in parts_of(memory).items()]
    rows += [("memory", memory.total, "bytes"), ("memory/capacity", memory.capacity, "bytes")]
    rows.append(("fits", None if memory.fits is None else int(memory.fits), ""))
    for one in plan.collectives:
        name = f"collectives/{one.kind}/{'+'.join(one.axes)}"
        rows += [(f"{name}/sent", one.sent, "bytes"), (f"{name}/count", one.count, "calls")]
    if times is not None and not program.error:
        rows += [(f"seconds/{name}", getattr(times, name), "s") for name in ("matmul", "memory", "network", "step")]
        rows += [
            ("bubble", times.bubble, "fraction"),
            ("utilization", plan.utilization, "fraction"),
            ("hours", plan.hours, "hours"),
            ("device_hours", plan.hours * program.experiment.mesh.size, "hours"),
        ]
    return [{"name": name, "value": value, "unit": unit} for name, value, unit in rows]


def write_json(
    path: str | Path, plan: Plan, extra: Sequence[dict] = (), ranking: Sequence[Plan] = (), shardings: bool = False
) -> None:
    """Writes the plan's rows, and ``extra`` ones, to a file.

    Args:
      ranking: plans that a search compared, the best first; their rows are in the file, too.
      shardings: whether the place of every parameter is in it.
    """
    limit = plan.times.limit if plan.times and not plan.program.error else None
    contents = {
        "target": plan.target.name,
        "compiled": not plan.target.lacks,
        "limit": limit,
        "rows": [*rows_of(plan), *extra],
    }
    if ranking:
        contents["search"] = [{"flags": describe(one), "rows": rows_of(one)} for one in ranking]
    if shardings:
        contents["shardings"] = [
            {"parameter": place, "dimensions": names, "shape": shape, "split_over": axes}
            for place, names, shape, axes in boxed_params(plan.program.experiment)
        ]
    write_text(Path(path), json.dumps(contents, indent=2) + "\n")


def parts_of(memory: Memory) -> dict[str, float]:
    """The kinds of bytes that a device holds, in the order in which they are shown."""
    names = ("parameters", "optimizer", "gradients", "activations", "temporaries", "batch")
    return {name: getattr(memory, name) for name in names}


def print_plan(plan: Plan, console: Console, notes: Sequence[str] = ()) -> None:
    """Prints the plan as tables, and ``notes`` on what it is of."""
    experiment, times = plan.program.experiment, plan.times
    axes = " x ".join(f"{axis} {size}" for axis, size in experiment.mesh.shape.items() if size > 1) or "one device"
    kind = experiment.mesh.devices.flat[0].device_kind
    total = sum(plan.parameters.values())
    parts = ", ".join(f"{part} {_number(count)}" for part, count in plan.parameters.items())
    lines = {
        "devices": f"{experiment.mesh.size} x {kind} ({axes})",
        "parameters": f"{total:,} ({parts})",
        "FLOPs a token": f"{plan.flops_per_token:.3e} forward, {3 * plan.flops_per_token:.3e} training (a multiply-add "
        "is two; of causal attention the half that is seen; lookups in embeddings nothing)",
        "batch": f"{plan.tokens:,} tokens; {experiment.split}",
    } | experiment.forms()
    lines["compiled"] = f"in {plan.program.seconds:.1f} s" if not plan.target.lacks else _not_compiled(plan)
    for name, value in [*lines.items(), *(("note", note) for note in notes)]:
        console.print(f"[bold]{name:>13}[/]  {value}", highlight=False, soft_wrap=True)
    for warning in moved_dimensions(experiment.abstract_params, experiment.layout):
        console.print(f"[yellow]{'sharding':>13}[/]  {warning}", highlight=False, soft_wrap=True)
    console.print(_memory_table(plan))
    if plan.collectives:
        console.print(_collective_table(plan))
    if times is not None and not plan.program.error:
        console.print(
            f"[bold]{'a step':>13}[/]  at least {seconds(times.step)}: matrix products {seconds(times.matmul)}, "
            f"memory {seconds(times.memory)}, network {seconds(times.network)}, pipeline idle {times.bubble:.1%}",
            highlight=False,
            soft_wrap=True,
        )
        console.print(
            f"[bold]{'bound':>13}[/]  {plan.utilization:.1%} of the bfloat16 peak, limited by {times.limit}; "
            f"{plan.config.train.steps:,} steps take {plan.hours:,.1f} hours, "
            f"{plan.hours * experiment.mesh.size:,.0f} device-hours, or more",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"[bold]{'verdict':>13}[/]  {verdict(plan)}", highlight=False, soft_wrap=True)


def verdict(plan: Plan) -> str:
    """Whether it fits, in words."""
    memory = plan.memory
    if plan.program.error:
        return f"[bold red]does not fit[/]: {_reason(plan.program.error)}"
    if memory.fits is None:
        return f"{_gib(memory.total)} a device; what {plan.target.name} holds is not known"
    word = "[bold green]fits[/]" if memory.fits else "[bold red]does not fit[/]"
    return f"{word}: {_gib(memory.total)} of {_gib(memory.capacity)} a device"


def print_shardings(plan: Plan, console: Console) -> None:
    """Prints each parameter with its dimensions by name, the mesh axes that split them, and what one device has."""
    rows = [("parameter", "dimensions", "split over", "on a device")]
    for place, names, shape, spec in boxed_params(plan.program.experiment):
        sizes = [f"{name or '-'} {size}" for name, size in zip(names, shape, strict=True)]
        places = ["+".join(axes) if axes else "-" for axes in spec]
        mesh = plan.program.experiment.mesh
        own = [size // math.prod(mesh.shape[axis] for axis in axes) for size, axes in zip(shape, spec, strict=True)]
        rows.append((place, " x ".join(sizes), " x ".join(places), " x ".join(map(str, own))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        console.print(line.rstrip(), highlight=False, soft_wrap=True, style="bold" if row is rows[0] else None)


def write_html(path: str | Path, plan: Plan) -> None:
    """Writes a page with pictures of memory and of every parameter's sharding."""
    experiment = plan.program.experiment
    axes = " × ".join(f"{axis} {size}" for axis, size in experiment.mesh.shape.items() if size > 1) or "one device"
    parts = [
        _memory_picture(plan),
        _numbers(plan),
        _sharding_pictures(plan),
    ]
    write_page(Path(path), f"{plan.target.name}: {experiment.mesh.size} devices", axes, parts)


def _not_compiled(plan: Plan) -> str:
    return (
        f"[yellow]no[/]: the compiler for {plan.target.name} is not installed (pip install 'lmx\\[{plan.target.lacks}]'"
        "); temporaries, collectives and times are estimated by formula"
    )


def _memory_table(plan: Plan) -> Table:
    memory, whole = plan.memory, "estimated" if plan.target.lacks else "as compiled"
    table = Table("memory of a device", "GiB", box=None, header_style="bold")
    table.columns[1].justify = "right"
    for name, value in parts_of(memory).items():
        table.add_row(name, f"{value / GIB:.3f}")
    if memory.total is not None:
        table.add_row(f"[bold]{whole}[/]", f"[bold]{memory.total / GIB:.3f}[/]")
    if memory.capacity is not None:
        table.add_row("capacity", f"{memory.capacity / GIB:.3f}")
    return table


def _collective_table(plan: Plan) -> Table:
    table = Table("collective", "over", "times", "GiB sent", box=None, header_style="bold")
    for column in table.columns[2:]:
        column.justify = "right"
    for one in plan.collectives:
        table.add_row(one.kind, " x ".join(one.axes), f"{one.count:,}", f"{one.sent / GIB:.3f}")
    return table


def _memory_picture(plan: Plan) -> str:
    memory = plan.memory
    parts = {name: value for name, value in parts_of(memory).items() if value}
    whole = max(sum(parts.values()), memory.capacity or 0)
    bars, keys, x = [], [], 0.0
    for color, (name, value) in zip(COLORS, parts.items(), strict=False):
        width = BAR * value / whole
        bars.append(
            f'<rect x="{x:.1f}" y="4" width="{width:.1f}" height="40" fill="var({color})">'
            f"<title>{name}: {_gib(value)}</title></rect>"
        )
        keys.append(f'<span><i style="background:var({color})"></i>{name} <b>{_gib(value)}</b></span>')
        x += width
    if memory.capacity is not None:
        edge = BAR * memory.capacity / whole
        bars.append(f'<line class="reference" x1="{edge:.1f}" x2="{edge:.1f}" y1="0" y2="48"/>')
        keys.append(f"<span>capacity <b>{_gib(memory.capacity)}</b></span>")
    picture = f'<svg viewBox="0 0 {BAR} 48" role="img">{"".join(bars)}</svg>'
    return f"<h2>Memory of a device</h2><figure><figcaption>{''.join(keys)}</figcaption>{picture}</figure>"


def _numbers(plan: Plan) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(row['name'])}</code></td><td>{_number(row['value'])}</td>"
        f"<td>{escape(row['unit'])}</td></tr>"
        for row in rows_of(plan)
        if row["value"] is not None
    )
    return f'<h2>Numbers</h2><div class="card"><table>{rows}</table></div>'


def _sharding_pictures(plan: Plan) -> str:
    """A grid a parameter: its two most divided dimensions, cut as they are cut."""
    mesh, pictures = plan.program.experiment.mesh, []
    for place, names, shape, spec in boxed_params(plan.program.experiment):
        cuts = [math.prod(mesh.shape[axis] for axis in axes) for axes in spec]
        order = sorted(range(len(shape)), key=lambda i: (-cuts[i], i))[:2]
        rows, columns = (min(16, cuts[i]) for i in (*sorted(order), *[order[0]] * (2 - len(order))))
        rows = 1 if len(shape) < 2 else rows
        cells = "".join(
            f'<rect x="{CELL * column}" y="{CELL * row}" width="{CELL - 2}" height="{CELL - 2}" fill="var(--series-0)" '
            f'opacity="{1 if row == column == 0 else 0.35}"/>'
            for row in range(rows)
            for column in range(columns)
        )
        words = " × ".join(
            f"{name or '–'} {size}" + (f" / {cut} ({' '.join(axes)})" if axes else "")
            for name, size, cut, axes in zip(names, shape, cuts, spec, strict=True)
        )
        pictures.append(
            f"<figure><figcaption><b>{escape(place)}</b> <span>{escape(words)}</span></figcaption>"
            f'<svg viewBox="0 0 {CELL * 16} {CELL * rows}" style="max-width:20rem" role="img">{cells}</svg></figure>'
        )
    note = (
        "Each cell is what one device holds of a parameter (of many parts the first sixteen); dark: the first device's."
    )
    return f'<h2>Parameters on the mesh</h2><p class="note">{note}</p><div class="charts">{"".join(pictures)}</div>'


def _reason(error: str) -> str:
    lines = [line.strip() for line in error.splitlines() if "memory" in line.lower() or "exceed" in line.lower()]
    return (lines or error.splitlines() or ["out of memory"])[0][:300]


def _gib(value: float) -> str:
    return f"{value / GIB:.2f} GiB"


def _number(value: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def seconds(value: float) -> str:
    """A time in a unit that suits it."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
