"""Overlap: every run that is there is found, and nothing else."""

import json

import pytest
from rich.console import Console

from lmx.errors import DataError
from lmx.preparation.overlap import overlap


@pytest.fixture
def sources(tmp_path):
    long = " ".join(f"word{i}" for i in range(40))
    train = ["Nothing of it", long.upper().replace(" ", ", "), "word0 word1"]
    evaluation = [
        long,
        f"one {' '.join(f'word{i}' for i in range(5, 20))} more",
        " ".join("abcdefghijklmnop"),
        "word3 word4",
    ]
    for name, texts in (("train", train), ("eval", evaluation)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


def test_runs_of_words_are_found_whatever_their_case_and_punctuation(sources, capsys):
    path = sources / "found.json"
    rows = overlap(f"jsonl:{sources}/train.jsonl", f"jsonl:{sources}/eval.jsonl", 13, Console(), json_path=str(path))
    values = {row["name"]: row["value"] for row in rows}
    assert values == {
        "examples": 4,
        "examples/judged": 3,
        "examples/dirty": 2,
        "examples/dirty_share": 2 / 3,
        "examples/whole": 1,
        "runs": 28 + 5 - 3 + 4,
        "runs/found": 28,
        "documents": 3,
        "documents/with_overlap": 1,
    }
    contents = json.loads(path.read_text())
    assert contents["rows"] == rows
    assert contents["dirty"] == [{"example": 0, "share": 1.0}, {"example": 1, "share": 3 / 5}]
    assert "100.0% of example 0: word0 word1" in capsys.readouterr().out


def test_all_sources_of_a_mixture_are_looked_through(sources):
    (sources / "other.jsonl").write_text(json.dumps({"text": "abcdefghijklmnop"}) + "\n")
    mixture = f"0.9*jsonl:{sources}/other.jsonl + 0.1*jsonl:{sources}/train.jsonl"
    values = {row["name"]: row["value"] for row in overlap(mixture, f"jsonl:{sources}/eval.jsonl", 13, Console())}
    assert values["documents"] == 4 and values["runs/found"] == 28


def test_what_cannot_be_judged_is_an_error(sources):
    train, evaluation = f"jsonl:{sources}/train.jsonl", f"jsonl:{sources}/eval.jsonl"
    with pytest.raises(DataError, match="no example of .* has 50 words; ask for fewer"):
        overlap(train, evaluation, 50, Console())
    with pytest.raises(DataError, match="at least 1 word"):
        overlap(train, evaluation, 0, Console())
