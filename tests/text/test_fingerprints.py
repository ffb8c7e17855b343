import os
import time

import pytest

from lmx.errors import DataError
from lmx.text import fingerprints as module
from lmx.text.corpora import open_source
from lmx.text.fingerprints import changes, fingerprints


def test_every_changed_file_is_named(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name * 10)
    before = fingerprints([tmp_path / name for name in "abc"], {})
    (tmp_path / "a").write_text("a" * 9 + "b")
    (tmp_path / "b").write_text("b" * 11)
    (tmp_path / "d").write_text("d")
    now = fingerprints([tmp_path / name for name in "abd"], before)
    assert changes(before, now) == [
        f"{tmp_path}/a has other content",
        f"{tmp_path}/b has 11 bytes where it had 10",
        f"{tmp_path}/c is gone",
        f"{tmp_path}/d is new",
    ]
    assert changes(before, before) == []


def test_the_same_data_elsewhere_is_the_same_data(tmp_path):
    taken = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        for name in "ab":
            (tmp_path / folder / name).write_text(name)
        taken.append(fingerprints(sorted((tmp_path / folder).iterdir()), {}))
    assert changes(*taken) == []
    (tmp_path / "there" / "a").rename(tmp_path / "there" / "c")  # read in another order
    assert changes(taken[0], fingerprints(sorted((tmp_path / "there").iterdir()), {})) != []


def test_a_file_is_hashed_once_and_again_when_it_was_touched(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("one")
    later = time.time() + 60
    hashed = []
    digest = module.file_digest
    monkeypatch.setattr(module, "file_digest", lambda name: hashed.append(name) or digest(name))
    just_now = fingerprints([path], {})
    monkeypatch.setattr(module.time, "time", lambda: later)
    settled = fingerprints([path], just_now)
    assert len(hashed) == 2  # the first was taken so soon after the write that another could have been missed
    assert fingerprints([path], settled) == settled and len(hashed) == 2
    times = os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns
    path.write_text("two")
    os.utime(path, ns=times)  # as a copying tool would: size and time of modification are as before
    assert changes(settled, fingerprints([path], settled)) == [f"{path} has other content"]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match="the data file .*/none cannot be read"):
        fingerprints([tmp_path / "none"], {})


def test_sources_know_their_files(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text " * 100)
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n')
    mixed = open_source(f"0.5*text:{tmp_path}[:50%] + 0.5*jsonl:{tmp_path}/c.jsonl")
    assert [path.name for path in mixed.files] == ["a.txt", "b.txt", "c.jsonl"]
    assert [path.name for path in open_source("builtin:python_manual").files] == ["topics.py"]
    assert open_source("builtin:copy", ("source",)).files == ()
