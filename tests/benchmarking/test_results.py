"""What is made of the measured times."""

import json

import pytest
from rich.console import Console

from lmx.benchmarking import measure
from lmx.benchmarking.cases import SYSTEMS, Case, Size, cases, gpt2
from lmx.benchmarking.measure import Measured, System, Timing
from lmx.benchmarking.show import Results, print_table, write_html
from lmx.errors import LmxError

CONFIG = gpt2(Size(2, 64, 2, 16))


def timing(*seconds, **more):
    return Timing(**{"seconds": list(seconds), "first_token": [], "result": 5.5, "ready": 3.0, "peak": 2e9} | more)


def measured(name, ours, goal=1.0, at_most=None, utilization=None, **theirs):
    case = Case(name, "training", CONFIG, goal=goal, utilization=utilization, at_most=at_most)
    timings = {"lmx": timing(*ours, flops=3e9)} | {system: timing(*times) for system, times in theirs.items()}
    return Measured(case, timings, {})


def test_the_ratio_is_over_the_fastest_peer_by_medians():
    found = measured("a", (1.0, 2.0, 9.0), eager=(6.0, 5.0, 5.0), compiled=(4.0, 4.0, 30.0))
    assert found.best_peer[0] == "compiled" and found.ratio == 2.0
    assert measured("b", (1.0, 1.0, 1.0)).ratio is None
    assert Measured(found.case, {"eager": timing(1.0)}, {"lmx": "no"}).ratio is None


def test_the_spread_is_that_of_the_middle_half():
    assert timing(10.0, 10.0, 10.0, 10.0, 10.0).spread == 0
    assert timing(8.0, 9.0, 10.0, 11.0, 12.0).spread == pytest.approx(0.15)


def results():
    found = Results("cpu", {"processor": "one", "jax": "0"}, peak=4e9)
    found.measured = [
        measured("dense", (1.0, 1.0, 1.0)),
        measured("sparse", (1.5,) * 3, goal=2.0, at_most=1.25, utilization=0.4, eager=(4.5,) * 3, twin=(1.0,) * 3),
        measured("sparser", (1.6,) * 3, goal=None, eager=(1.6,) * 3, twin=(1.0,) * 3),
        Measured(Case("broken", "loading", CONFIG), {}, {"eager": "ValueError: [no] such thing"}),
    ]
    return found


def test_rows_tell_value_unit_ratio_and_goal():
    rows = {row["name"]: row for row in results().rows()}
    assert rows["sparse: eager"]["value"] == 4.5 and rows["sparse: eager"]["unit"] == "s"
    assert rows["sparse: ratio"]["ratio"] == 3.0 and rows["sparse: ratio"]["goal"] == 2.0
    assert rows["sparse to its dense twin"]["ratio"] == 1.5 and rows["sparse to its dense twin"]["goal"] == 1.25
    assert rows["sparse: lmx, MFU"]["value"] == 3e9 / 1.5 / 4e9 and rows["sparse: lmx, MFU"]["goal"] == 0.4
    assert "goal" not in rows["dense: lmx, MFU"] and "goal" not in rows["sparse: eager, MFU"]
    assert rows["sparse: eager, MFU"]["value"] == 3e9 / 4.5 / 4e9  # the same work
    assert rows["broken: eager"]["value"] is None


def test_a_twins_utilization_is_of_its_own_flops():
    found = measured("sparse", (1.5,) * 3)
    found.timings["twin"] = timing(1.0, flops=2e9)
    assert Results("cpu", {}, peak=4e9).utilization(found, found.timings["twin"]) == 0.5


def test_the_table_and_the_page_show_goals_and_errors(tmp_path):
    console = Console(record=True, width=60)
    shown = results()
    shown.measured.append(
        Measured(Case("write", "generation", CONFIG), {"lmx": timing(0.5, 0.5, 0.5, first_token=[0.1])}, {})
    )
    print_table(shown, console)
    text = console.export_text()
    assert "11 tokens/s, the first 100 ms after a prompt of 64" in text  # 5.5 tokens in half a second
    assert "3.00 (≥ 2.0)" in text and "1.50 x the time of its dense twin (at most 1.25: missed)" in text
    assert "1.60 x the time of its dense twin\n" in text and "(≥ 40%)" in text
    assert "ValueError: [no] such thing" in text and "75%" in text
    write_html(tmp_path / "page.html", results())
    page = (tmp_path / "page.html").read_text()
    assert "<rect" in page and "eager 4.5 s" in page
    assert "<td>sparse: ratio</td><td>3</td><td></td><td>2</td>" in page
    assert "<td>broken: eager</td><td>–</td><td>ValueError: [no] such thing</td>" in page
    results().write_json(tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text())["machine"]["jax"] == "0"


def test_every_case_has_a_name_of_its_own_and_known_systems():
    for suite, platform in (("cpu", "cpu"), ("gpu", "gpu"), ("gpu", "cpu")):
        found = cases(suite, platform)
        assert len({case.name for case in found}) == len(found)
        assert all(set(case.systems) <= set(SYSTEMS) for case in found)
        assert all(("twin" in case.systems) == (case.twin is not None) for case in found)


class Fake:
    """A worker that answers at once."""

    def __init__(self, broken=()):
        self.asked, self.broken = [], broken

    def ask(self, do, **arguments):
        self.asked.append(do)
        if do in self.broken:
            raise LmxError(f"cannot {do}")
        run = {"seconds": [0.5 if "run" in self.asked[:-1] else 9.0]}  # the first is longer
        answers = {"open": {"result": 1.0, "ready": 2.0}, "run": run, "close": {"peak": 7.0}}
        return answers.get(do, {})


def test_systems_take_turns_and_one_that_fails_does_not_stop_the_others(monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    workers = {"lmx": Fake(), "eager": Fake(broken=("run",)), "compiled": Fake(broken=("open",))}
    found = measure.measure("cpu", "cpu", Case("a", "training", CONFIG), workers)
    assert found.timings.keys() == {"lmx"}
    assert found.timings["lmx"].seconds == [0.5] * 3 and found.timings["lmx"].peak == 7.0
    assert workers["lmx"].asked == ["prepare", "open", "run", "run", "run", "run", "close"]
    assert found.errors == {"eager": "cannot run", "compiled": "cannot open"} and workers["eager"].asked[1:] == ["run"]


def test_a_worker_says_what_went_wrong_and_goes_on():
    worker = System("eager")
    try:
        with pytest.raises(LmxError, match="StopIteration"):
            worker.ask("open", suite="cpu", platform="cpu", name="no such case", folder="/nowhere")
        assert "torch" in worker.ask("about")
    finally:
        worker.end()
    with pytest.raises(LmxError, match="the process of eager ended"):
        worker.ask("about")
