"""``lmx data inspect``: examples in colours, and how rows are filled, on the terminal and as a page."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from lmx.config import Config
from lmx.errors import DataError
from lmx.preparation.examples import Filling, Row, Token, look, open_examples
from lmx.training.report import write_page

SEGMENT_STYLES = ("cyan", "yellow", "green", "magenta")
LEGEND = (
    ("one segment", "cyan"), ("the next", "yellow"), ("special", "reverse"), ("seen both ways", "italic"),
    ("predicted, where few are", "underline"), ("not predicted, where most are", "dim"),
)  # fmt: skip
PAGE_STYLE = """<style>
.row { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; }
.row span { border-radius: 3px; padding: .1em 0; border-left: 1px solid var(--page); }
.s0 { background: color-mix(in srgb, var(--series-0) 22%, transparent); }
.s1 { background: color-mix(in srgb, var(--series-1) 22%, transparent); }
.s2 { background: color-mix(in srgb, var(--series-2) 22%, transparent); }
.s3 { background: color-mix(in srgb, var(--series-3) 22%, transparent); }
.special { font-weight: 600; font-size: .85em; } .prefix { font-style: italic; }
.predicted { text-decoration: underline; } .unpredicted { opacity: .45; } .row small { color: var(--bad); }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 6rem; }
.bars div { flex: 1; background: var(--series-0); }
</style>"""
BINS = 40


def inspect(
    config: Config, console: Console, num_rows: int = 4, num_batches: int = 20, html: str | None = None
) -> None:
    """Prints the first rows of training and how the first batches are filled, and writes a page if asked to.

    Args:
      html: the page's file.

    Raises:
      LmxError: the config, its data or the page cannot be opened.
    """
    experiment = open_examples(config, console)
    with console.status("reading …"):
        rows, fillings = look(experiment, num_rows, num_batches)
    for number, row in enumerate(rows, start=1):
        console.rule(_title(number, row), align="left")
        console.print(_colored(row), soft_wrap=True)
    console.rule("legend", align="left")
    console.print(Text("  ").join(Text(name, style) for name, style in LEGEND))
    console.rule(f"how rows are filled, over {num_batches} batches", align="left")
    for filling in fillings:
        for name, value in _facts(filling):
            console.print(f"{name:>24}  {value}", highlight=False)
    if html:
        _write_page(Path(html), config, rows, fillings)
        console.print(f"written: {Path(html).resolve()}", highlight=False, soft_wrap=True)


def _title(number: int, row: Row) -> str:
    return " · ".join(filter(None, (f"row {number}", row.stack, row.label)))


def _facts(filling: Filling) -> list[tuple[str, str]]:
    least, low, middle, high, most = np.percentile(filling.lengths, (0, 5, 50, 95, 100)).astype(int).tolist()
    facts = [
        (f"{filling.stack or 'all'} rows", f"{filling.rows:,} of {filling.length:,} positions"),
        ("packing efficiency", f"{filling.efficiency:.2%} of the positions hold a token"),
        ("segments", f"{len(filling.lengths):,}, {len(filling.lengths) / filling.rows:.2f} a row"),
        ("length of a segment", f"{least:,} to {most:,}; median {middle:,}; 5 % below {low:,}, 5 % above {high:,}"),
    ]
    if filling.predicted is not None:
        facts.append(("predicted", f"{filling.predicted / filling.tokens:.2%} of the tokens"))
    return facts


def _kinds(token: Token, mostly_predicted: bool) -> list[str]:
    """What a token is marked as, beside its segment."""
    marks = [("special", token.special), ("prefix", token.prefix)]
    marks.append(("unpredicted", not token.predicted) if mostly_predicted else ("predicted", token.predicted))
    return [name for name, is_so in marks if is_so]


def _mostly_predicted(row: Row) -> bool:
    return sum(token.predicted for token in row.tokens) * 2 > sum(token.segment > 0 for token in row.tokens)


def _colored(row: Row) -> Text:
    styles = {"special": "reverse", "prefix": "italic", "predicted": "underline bold", "unpredicted": "dim"}
    mostly, text, padding = _mostly_predicted(row), Text(), 0
    for token in row.tokens:
        if not token.segment:
            padding += 1
            continue
        marks = " ".join(styles[kind] for kind in _kinds(token, mostly))
        text.append(token.text, f"{SEGMENT_STYLES[token.segment % len(SEGMENT_STYLES) - 1]} {marks}")
        if token.target:
            text.append(f"→{token.target}", "red")
    return text.append(f" + {padding:,} of padding", "dim") if padding else text


def _write_page(path: Path, config: Config, rows: Sequence[Row], fillings: Sequence[Filling]) -> None:
    parts = [PAGE_STYLE]
    for filling in fillings:
        cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in _facts(filling))
        parts.append(f'<h2>{escape(filling.stack.capitalize() or "Rows")}</h2><div class="card"><table>{cells}</table>')
        parts.append(f"{_histogram(filling)}</div>")
    for number, row in enumerate(rows, start=1):
        parts.append(f'<h2>{escape(_title(number, row))}</h2><div class="card row">{_spans(row)}</div>')
    legend = "".join(
        f'<span class="{kind}">{kind}</span> ' for kind in ("special", "predicted", "unpredicted", "prefix")
    )
    parts.append(f'<p class="note">A colour a segment; {legend}; <small>→ what is predicted in its place</small></p>')
    try:
        write_page(path, "Examples", f"{config.objective.name} on {config.data.train}", parts)
    except OSError as error:
        raise DataError(f"--html: {path} cannot be written ({error}).") from None


def _histogram(filling: Filling) -> str:
    counts, edges = np.histogram(filling.lengths, BINS)
    heights = (100 * counts / counts.max()).tolist()
    bars = "".join(
        f'<div style="height:{height:.1f}%" title="{count:,} of {low:,.0f} to {high:,.0f} tokens"></div>'
        for height, count, low, high in zip(heights, counts.tolist(), edges[:-1], edges[1:], strict=True)
    )
    title = f"Segments by their length, {edges[0]:,.0f} to {edges[-1]:,.0f} tokens"
    return f'<p class="note">{title}</p><div class="bars">{bars}</div>'


def _spans(row: Row) -> str:
    mostly, spans = _mostly_predicted(row), []
    for token in row.tokens:
        if token.segment:
            kinds = " ".join([f"s{(token.segment - 1) % 4}", *_kinds(token, mostly)])
            target = f"<small>→{escape(token.target)}</small>" if token.target else ""
            spans.append(f'<span class="{kinds}">{escape(token.text)}</span>{target}')
    padding = sum(not token.segment for token in row.tokens)
    return "".join(spans) + (f'<p class="note">and {padding:,} of padding</p>' if padding else "")
