"""What was measured, as a table, as JSON and as a page with a picture."""

import html
import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from lmx.benchmarking.cases import SYSTEMS
from lmx.benchmarking.measure import Measured, Timing
from lmx.planning.show import seconds
from lmx.training.report import write_page

MIB = 2**20
# The widest that a processor has comes first: what clouds sell under one name may differ in it, and twice in speed.
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}
# What a case's first turn gave.
RESULTS = {"training": "nats", "generation": "tokens", "input": "tokens", "loading": ""}


class Results:
    """All that a suite has measured so far.

    Attributes:
      suite: its name.
      about: the machine and versions, by name.
      peak: measured FLOP/s of the machine's matrix products.
      measured: the cases.
    """

    def __init__(self, suite: str, about: dict[str, str], peak: float):
        self.suite, self.about, self.peak = suite, about, peak
        self.measured: list[Measured] = []

    def utilization(self, found: Measured, timing: Timing) -> float | None:
        """FLOPs of the model over what the machine could have done in that time, by the measured peak."""
        flops = timing.flops or found.flops
        return flops / timing.median / self.peak if flops else None

    def rows(self) -> list[dict[str, Any]]:
        """As ``--json`` has it: every row a name, a value and its unit.

        A ratio is at least its goal where it is over a peer; to the dense twin it is at most that.
        """
        rows = [{"name": "matmul peak", "value": self.peak, "unit": "FLOP/s"}]
        for found in self.measured:
            name = found.case.name
            for system, timing in found.timings.items():
                rows += [
                    {"name": f"{name}: {system}", "value": timing.median, "unit": "s", "seconds": timing.seconds},
                    {"name": f"{name}: {system}, spread", "value": timing.spread, "unit": ""},
                    {"name": f"{name}: {system}, peak memory", "value": timing.peak, "unit": "bytes"},
                    {"name": f"{name}: {system}, ready", "value": timing.ready, "unit": "s"},
                    {"name": f"{name}: {system}, result", "value": timing.result, "unit": RESULTS[found.case.kind]},
                ]
                if timing.compile is not None:
                    rows.append({"name": f"{name}: {system}, compile", "value": timing.compile, "unit": "s"})
                if timing.first_token:
                    rows.append(
                        {
                            "name": f"{name}: {system}, first token",
                            "value": statistics.median(timing.first_token),
                            "unit": "s",
                        }
                    )
                if (part := self.utilization(found, timing)) is not None:
                    rows.append({"name": f"{name}: {system}, MFU", "value": part, "unit": ""})
                    if system == "lmx" and found.case.utilization:
                        rows[-1]["goal"] = found.case.utilization
            rows += [{"name": f"{name}: {system}", "value": None, "unit": why} for system, why in found.errors.items()]
            if found.ratio is not None:
                rows.append({"name": f"{name}: ratio", "value": found.ratio, "unit": "", "ratio": found.ratio})
                rows[-1]["goal"] = found.case.goal
            if (longer := found.to_twin) is not None:
                rows.append({"name": f"{name} to its dense twin", "value": longer, "unit": "", "ratio": longer})
                rows[-1]["goal"] = found.case.at_most
        return rows

    def write_json(self, path: str | Path) -> None:
        """Writes everything that was measured."""
        content = {"suite": self.suite, "machine": self.about, "rows": self.rows()}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def machine(versions: dict[str, str]) -> dict[str, str]:
    """What the figures belong to: the processor, the system, and versions."""
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in _cpuinfo())}
    processor = fields.get("model name") or platform.processor() or platform.machine()
    flags = fields.get("flags", "").split()
    processor = ", ".join([processor, *(name for flag, name in VECTORS.items() if flag in flags)][:2])
    return {"processor": processor, "python": platform.python_version(), "system": platform.platform(), **versions}


def print_table(results: Results, console: Console) -> None:
    """Prints every case, a line a system; the fastest peer is what lmx's ratio is over."""

    def line(*texts: str) -> None:
        widths = (10, 10, 6, 14, 12, 12, 10, 0)
        cells = (text.ljust(width) for text, width in zip(texts, widths, strict=True))
        console.print("  " + " ".join(cells).rstrip(), highlight=False, soft_wrap=True)

    line("system", "time", "±", "ratio", "MFU", "memory", "ready", "")
    for found in results.measured:
        console.print(f"[bold]{escape(found.case.name)}[/]", highlight=False)
        for system, timing in found.timings.items():
            part, rate = results.utilization(found, timing), ""
            if RESULTS[found.case.kind] == "tokens":
                rate = f"{timing.result / timing.median:,.0f} tokens/s"
            if timing.first_token:
                first = seconds(statistics.median(timing.first_token))
                rate += f", the first {first} after a prompt of {found.case.prompt_length}"
            line(
                system,
                seconds(timing.median),
                f"{timing.spread:.0%}",
                _ratio(found) if system == "lmx" else "",
                "" if part is None else f"{part:.0%}" + (_least(found) if system == "lmx" else ""),
                "" if timing.peak is None else f"{timing.peak / MIB:,.0f} MiB",
                seconds(timing.ready),
                rate,
            )
        for system, why in found.errors.items():
            console.print(f"  {system}: {why[:200]}", style="red", highlight=False, markup=False, soft_wrap=True)
        if (longer := found.to_twin) is not None:
            most = found.case.at_most
            goal = f" (at most {most}: {'met' if longer <= most else 'missed'})" if most else ""
            console.print(f"  {longer:.2f} x the time of its dense twin{goal}", highlight=False)
    console.print(
        f"\nratio: the time of the fastest peer by that of lmx, and the goal. MFU: FLOPs of the model's matrix "
        f"products (training is 3 x forward; lmx.models.flops) by time and by {results.peak / 1e9:,.0f} GFLOP/s, which "
        "is what a large matrix product reaches here. ±: half of what the middle half of the turns differ by. memory: "
        "most from the first turn on. ready: from making the model to the end of the first turn, with compiling.",
        highlight=False,
    )
    for system, meaning in SYSTEMS.items():
        if any(system in found.timings for found in results.measured):
            console.print(f"{system}: {meaning}", highlight=False)


def write_html(path: str | Path, results: Results) -> None:
    """Writes a page with a bar for every time, and all numbers."""
    bars = "".join(map(_bars, results.measured))
    head = "<tr><th>what</th><th>value</th><th>unit</th><th>goal</th></tr>"
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in _cells(row)) + "</tr>" for row in results.rows()
    )
    parts = [f"<h2>Time</h2>{bars}", f'<h2>Numbers</h2><div class="card"><table>{head}{rows}</table></div>']
    about = " · ".join(f"{name} {value}" for name, value in results.about.items())
    write_page(Path(path), f"lmx bench, suite {results.suite}", about, parts)


def _cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """Name, value, unit and goal; of a system that could not do its work, the unit says why."""
    value, goal = (row.get(name) for name in ("value", "goal"))
    return row["name"], "–" if value is None else f"{value:,.4g}", row["unit"], "" if goal is None else f"{goal:g}"


def _bars(found: Measured) -> str:
    longest, bars = max((timing.median for timing in found.timings.values()), default=1.0), []
    for number, (system, timing) in enumerate(found.timings.items()):
        width, y = 460 * timing.median / longest, 22 * number
        bars.append(f'<rect x="0" y="{y}" width="{width:.1f}" height="16" fill="var(--series-{number})"/>')
        bars.append(f'<text x="{width + 6:.1f}" y="{y + 13}">{system} {seconds(timing.median)}</text>')
    height = 22 * len(found.timings)
    picture = f'<svg viewBox="0 0 640 {height}" role="img">{"".join(bars)}</svg>'
    return f"<figure><figcaption><strong>{html.escape(found.case.name)}</strong></figcaption>{picture}</figure>"


def _ratio(found: Measured) -> str:
    if found.ratio is None:
        return ""
    return f"{found.ratio:.2f}" if found.case.goal is None else f"{found.ratio:.2f} (≥ {found.case.goal})"


def _least(found: Measured) -> str:
    least = found.case.utilization
    return f" (≥ {least:.0%})" if least else ""


def _cpuinfo() -> Sequence[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else ()
