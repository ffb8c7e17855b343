import html.parser
import json
import math
import re
from xml.etree import ElementTree

import pytest

from lmx.config import Config, to_dict
from lmx.errors import CheckpointError
from lmx.training.curves import format_number, line_chart, nice_ticks, thin
from lmx.training.report import write_report


def make_run(workdir, lines, samples=None, environment=(), **changes):
    contents = {"config": to_dict(Config().replace(**changes)), "asked": {}, **dict(environment)}
    (workdir / "config.json").write_text(json.dumps(contents))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if samples is not None:
        (workdir / "samples.txt").write_text(samples)
    return write_report(workdir).read_text(encoding="utf-8")


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.split("</style>")[1]))


def lines(last, **metrics):
    return [{"step": step, "train/loss": 5 - step / last, **metrics} for step in range(1, last + 1)]


def test_a_page_that_needs_nothing_else(tmp_path):
    run = lines(10, learning_rate=3e-4, tokens_per_second=12345.0)
    run[-1]["eval/loss"] = 4.25
    environment = {"device": "TPU v4", "num_devices": 8, "versions": {"jax": "0.10.2"}}
    page = make_run(tmp_path, run, environment=environment, train={"steps": 10})
    text = text_of(page)
    for shown in ("Training loss 4", "Held-out loss 4.25", "12.35k median", "Device TPU v4", "Devices 8", "jax 0.10.2"):
        assert shown in text, shown
    assert not re.search(r"<script|<link|<img|@import|url\(|https?://", page)
    assert page.count("<svg") == 3  # train and held-out loss share one
    assert [path.name for path in tmp_path.glob("report*")] == ["report.html"]


def test_elements_are_closed_and_text_is_escaped(tmp_path):
    nasty = '</pre><script>alert("x")</script> & so on'
    page = make_run(tmp_path, lines(3), samples=nasty, expect={"source": "<i>", "value": 1.0})
    open_elements = []

    class Checker(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag != "script"
            if tag != "meta":
                open_elements.append(tag)

        def handle_startendtag(self, tag, attrs):
            pass

        def handle_endtag(self, tag):
            assert open_elements.pop() == tag

    Checker().feed(page)
    assert open_elements == []
    assert "&lt;/pre&gt;&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; so on" in page


@pytest.mark.parametrize(
    ("steps", "found", "verdict"),
    [
        (10, 2.06, "Found 2.06 (+3.0%): met"),
        (10, 2.3, "Found 2.3 (+15.0%): not met"),
        (99, 2.06, "So far: 2.06 at step 10 of 99."),
        (99, None, "So far: not measured yet."),
    ],
)
def test_expected_against_found(tmp_path, steps, found, verdict):
    run = lines(10)
    if found is not None:
        run[-1]["eval/loss"] = found
    text = text_of(make_run(tmp_path, run, train={"steps": steps}, expect={"value": 2.0, "hardware": "one A100"}))
    assert "eval/loss of 2 ± 5% · one A100" in text
    assert verdict in text.replace(" :", ":")
    assert ("expected 2" in text) == (found is not None)


def test_changed_settings_come_first(tmp_path):
    text = text_of(make_run(tmp_path, lines(1), optimizer={"name": "lion"}, seed=7))
    own = text[text.index("Set otherwise") : text.index("Everything")]
    assert "optimizer.name &quot;lion&quot;" in own and "seed 7" in own
    assert "num_layers" not in own and "model.num_layers 12" in text


def test_a_run_that_has_only_begun(tmp_path):
    text = text_of(make_run(tmp_path, []))
    assert "Steps 0 of 1,000" in text
    assert "Curves" not in text and "Expectation" not in text and "Samples" not in text


def test_not_a_workdir(tmp_path):
    with pytest.raises(CheckpointError, match="metrics.jsonl does not exist"):
        write_report(tmp_path)
    make_run(tmp_path, lines(1))
    (tmp_path / "config.json").write_text('{"config": {"modle": {}}}')
    with pytest.raises(CheckpointError, match="no config of lmx"):
        write_report(tmp_path)


def test_chart_puts_points_where_they_belong():
    chart = line_chart(
        "Loss", {"train": [(0, 2.0), (50, 8.0), (100, 0.0)], "eval": [(100, 4.0)]}, width=268, height=136
    )
    svg = ElementTree.fromstring(chart[chart.index("<svg") : chart.index("</svg>") + 6])
    # 100 steps on 200 pixels from 52 on; the ticks 0, 5, 10 on 100 pixels, 10 being at 10
    points = [list(map(float, pair.split(","))) for pair in svg.findall("polyline")[0].get("points").split()]
    assert points == [[52, 90], [152, 30], [252, 110]]
    assert "eval 4 at step 100" in chart
    assert chart.index("train <b>0</b>") < chart.index("eval <b>4</b>")


def test_chart_breaks_at_values_that_are_not_finite():
    points = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 3.0), (4, math.inf)]
    assert line_chart("Loss", {"train": points}).count("<polyline") == 2
    assert line_chart("Loss", {"train": [(0, math.nan)]}) == ""


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0.0, 10.0, 5, [0, 2, 4, 6, 8, 10]),
        (1.3, 2.9, 4, [1.0, 1.5, 2.0, 2.5, 3.0]),
        (0.00012, 0.0003, 3, [0.0001, 0.0002, 0.0003]),
        (5.0, 5.0, 2, [4.5, 5.0, 5.5]),
        (0.0, 0.0, 2, [-1, 0, 1]),
    ],
)
def test_ticks_are_round_and_enclose(low, high, most, expected):
    assert nice_ticks(low, high, most) == pytest.approx(expected)


def test_steps_have_whole_ticks():
    assert nice_ticks(1, 3, 8, whole=True) == [1, 2, 3]


def test_thinning_keeps_spikes_and_order():
    points = [(float(x), 0.0) for x in range(10_000)]
    points[4321], points[8765] = (4321.0, 9.0), (8765.0, -9.0)
    kept = thin(points, 600)
    assert len(kept) <= 600
    assert points[4321] in kept and points[8765] in kept
    assert kept == sorted(kept)
    assert thin(points[:600], 600) == points[:600]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (3e-4, "0.0003"),
        (1234.5, "1234"),
        (12500, "12.5k"),
        (1.24e6, "1.24M"),
        (-2.5e9, "-2.5B"),
        (2.5, "2.5"),
    ],
)
def test_short_numbers(value, text):
    assert format_number(value) == text
