"""``report.html``: a run on one page that opens from disk, with no network and no scripts."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lmx.config import Config, differences, field_types, from_dict, to_dict
from lmx.errors import CheckpointError
from lmx.training.curves import format_number, line_chart
from lmx.training.metrics import read_metrics
from lmx.training.workdir import write_text

MOST_SAMPLE_CHARACTERS = 20_000

TITLES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "tokens_per_second": "Tokens per second",
    "model_flops_utilization": "Model FLOPs utilization",
    "grad_norm": "Gradient norm",
}

STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1a1a19; --faint: #6b6a66; --grid: #e6e5e1;
  --good: #14794e; --bad: #b3372b; --series-0: #2a78d6; --series-1: #e0612c; --series-2: #1a9b6c; --series-3: #8a5fd0; }
@media (prefers-color-scheme: dark) { :root { --page: #141413; --card: #1e1e1c; --ink: #ecebe6; --faint: #9c9a93;
  --grid: #33322f; --good: #4cc38a; --bad: #f2786b; --series-0: #4a95ec; --series-1: #ee8051; --series-2: #35b685;
  --series-3: #a988e6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
header { margin-bottom: 1.5rem; }
h1 { margin: 0; font-size: 1.7rem; letter-spacing: -.01em; }
h2 { margin: 2.25rem 0 .75rem; font-size: 1.05rem; }
header p, .note { margin: .5rem 0; color: var(--faint); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 0; }
.tiles div, figure, .card, details { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; }
.tiles div { padding: .7rem .9rem; }
dt { color: var(--faint); font-size: .8rem; }
dd { margin: 0; font-size: 1.2rem; font-weight: 600; overflow-wrap: anywhere; }
dd small { font-size: .8rem; font-weight: 400; color: var(--faint); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: .75rem; }
figure { margin: 0; padding: .8rem .9rem .5rem; }
.charts figure:first-child { grid-column: 1 / -1; }
figcaption { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; align-items: baseline; margin-bottom: .35rem; }
figcaption span { color: var(--faint); font-size: .85rem; }
figcaption b { color: var(--ink); font-variant-numeric: tabular-nums; }
figcaption i { display: inline-block; width: .8rem; height: 3px; border-radius: 2px; margin-right: .4rem;
  vertical-align: middle; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--faint); font-size: 11px; font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--grid); }
svg .line { fill: none; stroke-width: 1.75; stroke-linejoin: round; stroke-linecap: round; }
svg .reference { stroke: var(--faint); stroke-dasharray: 4 4; }
svg .hint:hover circle { stroke: var(--ink); stroke-width: 1.5; }
.card { padding: .8rem 1rem; }
.card p { margin: 0; } .card p + p { margin-top: .3rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
details { padding: .55rem 1rem; margin-bottom: .5rem; }
summary { cursor: pointer; font-weight: 600; }
summary small { font-weight: 400; color: var(--faint); }
table { width: 100%; border-collapse: collapse; margin: .5rem 0; font-size: .85rem; }
td { padding: .25rem .75rem .25rem 0; border-top: 1px solid var(--grid); vertical-align: top; }
td:last-child { color: var(--faint); }
tr:first-child td { border-top: 0; } td code { overflow-wrap: anywhere; }
td:first-child { width: 16rem; } td:nth-child(2) { width: 16rem; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .85em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; max-height: 32rem; overflow-y: auto; }
"""


def write_report(workdir: str | Path) -> Path:
    """Writes ``workdir/report.html`` from ``config.json``, ``metrics.jsonl`` and, where there is one, ``samples.txt``.

    Whatever ``config.json`` holds beside the config (device, number of devices, versions) is shown with the summary.

    Returns:
      The page's path.

    Raises:
      CheckpointError: the folder is no workdir, or one of the two files is damaged.
    """
    folder = Path(workdir)
    lines = read_metrics(folder)
    settings, environment = _read_config(folder)
    samples = folder / "samples.txt"
    body = [
        _summary(lines, settings, environment),
        _expectation(lines, settings),
        _charts(lines, settings),
        _samples(samples.read_text(encoding="utf-8", errors="replace")) if samples.is_file() else "",
        _settings(settings),
    ]
    path = folder / "report.html"
    write_page(path, folder.resolve().name, _subtitle(settings), body)
    return path


def write_page(path: Path, title: str, subtitle: str, parts: Sequence[str]) -> None:
    """Writes a page of HTML parts that opens from disk, whole or not at all; empty parts are left out."""
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · lmx</title><style>{STYLE}</style></head>\n<body>"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n"
        f"{chr(10).join(filter(None, parts))}\n</body></html>\n"
    )
    write_text(path, page)


def _read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The resolved config, and whatever else the file tells."""
    path = folder / "config.json"
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        settings = contents.pop("config")
        from_dict(settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is missing or no config of lmx ({type(error).__name__}: {error}).") from error
    return settings, {name: value for name, value in contents.items() if name != "asked"}


def _subtitle(settings: Mapping[str, Any]) -> str:
    model, objective = settings["model"], settings["objective"]["name"]
    return (
        f"{model['architecture'].replace('_', '-')} · {model['num_layers']} layers × {model['embed_dim']} wide · "
        f"{objective.replace('_', ' ')} on {settings['data']['train']}"
    )


def _points(lines: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in lines if name in line]


def _summary(lines: Sequence[Mapping[str, float]], settings: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    done, planned = (lines[-1]["step"] if lines else 0), settings["train"]["steps"]
    tiles = [("Steps", f"{done:,}" + (f" <small>of {planned:,}</small>" if done < planned else ""))]
    for name, label in (("train/loss", "Training loss"), ("eval/loss", "Held-out loss")):
        points = [(step, value) for step, value in _points(lines, name) if math.isfinite(value)]
        if points:
            best_step, best = min(points, key=lambda point: point[1])
            note = f" <small>best {best:.4g} at {best_step:,}</small>" if name == "eval/loss" else ""
            tiles.append((label, f"{points[-1][1]:.4g}{note}"))
    rates = [value for _, value in _points(lines, "tokens_per_second") if math.isfinite(value)]
    if rates:
        tiles.append(("Tokens per second", f"{format_number(statistics.median(rates))} <small>median</small>"))
    notes = []
    for name, value in environment.items():
        if isinstance(value, Mapping):
            notes += [f"{inner} {value[inner]}" for inner in value]
            continue
        label = name.removeprefix("num_").replace("_", " ").capitalize()
        tiles.append((label, format_number(value) if isinstance(value, int | float) else escape(str(value))))
    cells = "".join(f"<div><dt>{escape(label)}</dt><dd>{value}</dd></div>" for label, value in tiles)
    return f'<dl class="tiles">{cells}</dl><p class="note">{escape(" · ".join(notes))}</p>'


def _expectation(lines: Sequence[Mapping[str, float]], settings: Mapping[str, Any]) -> str:
    """What the config claims beside what was found."""
    expect, steps = settings["expect"], settings["train"]["steps"]
    if expect["value"] is None:
        return ""
    metric, expected, tolerance = expect["metric"], expect["value"], expect["tolerance"]
    points = _points(lines, metric)
    claim = f"<code>{escape(metric)}</code> of <b>{expected:.4g}</b> ± {tolerance:.0%}"
    if not points or points[-1][0] < steps:
        reached = f"{points[-1][1]:.4g} at step {points[-1][0]:,} of {steps:,}" if points else "not measured yet"
        verdict = f"So far: {reached}."
    else:
        found = points[-1][1]
        off = (found - expected) / abs(expected) if expected else found
        met = abs(found - expected) <= tolerance * abs(expected)
        kind, word = ("good", "met") if met else ("bad", "not met")
        verdict = f'Found <b>{found:.4g}</b> ({off:+.1%}): <b class="{kind}">{word}</b>.'
    minutes = f"{expect['minutes']:g} minutes" if expect["minutes"] is not None else ""
    known = " · ".join(filter(None, (claim, escape(expect["hardware"]), minutes, escape(expect["source"]))))
    return f'<h2>Expectation</h2><div class="card"><p>{known}</p><p>{verdict}</p></div>'


def _charts(lines: Sequence[Mapping[str, float]], settings: Mapping[str, Any]) -> str:
    """A picture a quantity, its training and held-out curves together, and those of each source of a mixture; the loss
    first and widest."""
    groups: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(name for line in lines for name in line if name != "step"):
        split, slash, rest = name.partition("/")
        quantity, _, source = rest.partition("/") if slash else (name, "", "")
        groups.setdefault(quantity, {})[name] = f"{split if slash else ''} {source}".strip()
    order = sorted(groups, key=lambda quantity: (quantity != "loss", len(groups[quantity]) == 1))
    expect = settings["expect"]
    pictures = []
    for quantity in order:
        series = {label: _points(lines, name) for name, label in sorted(groups[quantity].items(), key=_train_first)}
        claimed = expect["metric"] in groups[quantity] and expect["value"] is not None
        pictures.append(
            line_chart(
                TITLES.get(quantity, quantity.replace("_", " ").capitalize()),
                series,
                width=960 if not pictures else 460,
                height=320 if not pictures else 210,
                reference=(f"expected {expect['value']:.4g}", expect["value"]) if claimed else None,
            )
        )
    return f'<h2>Curves</h2><div class="charts">{"".join(pictures)}</div>' if any(pictures) else ""


def _train_first(item: tuple[str, str]) -> bool:
    return not item[0].startswith("train/")


def _samples(text: str) -> str:
    if not text.strip():
        return ""
    cut = text[-MOST_SAMPLE_CHARACTERS:]
    note = f'<p class="note">The last {len(cut):,} of {len(text):,} characters.</p>' if len(cut) < len(text) else ""
    return f'<h2>Samples</h2>{note}<div class="card"><pre>{escape(cut)}</pre></div>'


def _settings(settings: Mapping[str, Any]) -> str:
    """Every field with its meaning, a table a section; those that differ from the default first."""
    changed = differences(to_dict(Config()), settings)
    sections: dict[str, list[str]] = {}
    for name, field in field_types().items():
        value = settings
        for part in name.split("."):
            value = value[part]
        cells = (f"<code>{escape(name)}</code>", f"<code>{escape(json.dumps(value, ensure_ascii=False))}</code>")
        row = f"<tr><td>{cells[0]}</td><td>{cells[1]}</td><td>{escape(field.metadata['meaning'])}</td></tr>"
        sections.setdefault(name.rpartition(".")[0] or "run", []).append(row)
        if name in changed:
            sections.setdefault("", []).append(row)
    own = sections.pop("", [])
    shown = f'<div class="card"><table>{"".join(own)}</table></div>' if own else ""
    tables = "".join(
        f"<details><summary>{escape(section)}</summary><table>{''.join(rows)}</table></details>"
        for section, rows in sections.items()
    )
    return (
        f'<h2>Configuration</h2><p class="note">Set otherwise than by default:</p>{shown}'
        f'<p class="note">Everything:</p>{tables}'
    )
