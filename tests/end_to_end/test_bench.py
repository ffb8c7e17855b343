"""The suites run to their end, and all systems do the same work."""

import json

import pytest

from tests.end_to_end.conftest import lmx


@pytest.mark.slow
def test_the_gpu_suite_can_be_tried_without_one(tmp_path):
    path, page = tmp_path / "rows.json", tmp_path / "page.html"
    done = lmx("bench", "--suite", "gpu", "--json", path, "--html", page, timeout=1800)
    assert "no GPU here" in done.stdout and "train gpt2 124m" in done.stdout and page.is_file()
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert not [name for name, row in rows.items() if row["value"] is None]  # nobody failed
    trained = {name.partition(": lmx, result")[0] for name in rows if name.endswith(": lmx, result")}
    trained = [name for name in trained if name.startswith("train")]
    assert len(trained) == 9
    twin, same = (rows[f"{name}, result"]["value"] for name in ("train switch base 8: twin", "train t5 base: lmx"))
    assert rows["train switch base 8 to its dense twin"]["ratio"] > 0 and twin == pytest.approx(same, rel=1e-5)
    assert all(0 < rows[f"{name}: lmx, MFU"]["value"] < 1 for name in trained)
    for name in set(trained) - {"train gpt2 1558m"}:  # two of that size do not fit on one card: it has no peer
        ours, theirs = (rows[f"{name}: {system}, result"]["value"] for system in ("lmx", "eager"))
        assert ours == pytest.approx(theirs, rel=1e-5), name  # the first step's loss, of equal parameters and batches
        assert rows[f"{name}: ratio"]["ratio"] > 0
    for rows_of_prompts in (1, 8, 64):
        made = rows[f"generate gpt2 124m, batch {rows_of_prompts}: lmx, result"]["value"]
        assert made == 8 * rows_of_prompts


def test_what_cannot_be_measured_is_said_before_anything_is(tmp_path):
    done = lmx("bench", "--json", tmp_path / "no" / "rows.json", check=False)
    assert done.returncode == 2 and "there is no folder" in done.stderr
    (file := tmp_path / "file").touch()
    done = lmx("bench", "--profile", file / "traces", check=False)
    assert done.returncode == 2 and f"{file} is a file" in done.stderr
    done = lmx("bench", "--suite", "cpu", "--only", "gpt9", check=False)
    assert done.returncode == 2 and "no case of cpu" in done.stderr and "train gpt2 small" in done.stderr
