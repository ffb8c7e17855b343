"""``lmx data prepare``: what it writes, and that neither interruptions nor processes change a byte of it."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("rensa")

from lmx import cli
from lmx import config as schema
from lmx.errors import ConfigError, DataError
from lmx.preparation.documents import Reading
from lmx.preparation.prepare import prepare
from lmx.text.corpora import open_source
from lmx.text.tokenizers import ByteTokenizer
from tests.preparation.corpora import DOCUMENTS, contents, run, settings, write_corpus


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    """The corpus, prepared in one go: folder and manifest."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, run(folder, sources)


def texts(folder: Path, split: str) -> list[str]:
    source = open_source(f"prepared:{folder}@{split}")
    return [source[i]["text"] for i in range(len(source))]


def test_every_document_is_written_once_or_counted_as_dropped(sources, whole):
    folder, manifest = whole
    counts = manifest["counts"]
    dropped = {name: step["documents"] for name, step in counts["dropped"].items()}
    found = [text for split in ("train", "validation") for text in texts(folder, split)]
    originals = [open_source(spec) for spec in sources]
    raw = [source[i]["text"] for source in originals for i in range(len(source))]
    assert counts["read"] == {"documents": len(raw), "characters": sum(map(len, raw))}
    assert len(raw) == DOCUMENTS + 40 == len(found) + sum(dropped.values())
    assert len(set(found)) == len(found) and set(found) <= {text.replace("\r", "") for text in raw}
    assert dropped["exact"] == 10 and dropped["near"] > 15 and dropped["min_words"] > 0
    assert counts["dropped"]["control"]["characters"] == sum(text.count("\r") for text in raw)


def test_the_manifest_says_what_is_there(whole):
    folder, manifest = whole
    for split, about in manifest["splits"].items():
        documents = texts(folder, split)
        encoded = ByteTokenizer().encode_batch(documents)
        offsets = np.fromfile(folder / about["index"]["file"], np.int64)
        assert offsets.tolist() == np.cumsum([0, *map(len, encoded)]).tolist()
        assert (about["documents"], about["tokens"]) == (len(documents), offsets[-1])
        assert about["characters"] == sum(map(len, documents))
        for file in [about["index"], *about["shards"]]:
            assert hashlib.sha256((folder / file["file"]).read_bytes()).hexdigest() == file["sha256"]
    assert len(manifest["splits"]["train"]["shards"]) > 3
    assert manifest["tokenizer"]["sha256"] == ByteTokenizer().fingerprint()
    assert manifest["sources"][1]["files"][0]["path"].endswith("records.jsonl")
    assert sorted(path.name for path in folder.iterdir() if path.suffix not in (".array_record", ".index")) == [
        ".lock", "manifest.json", "tokenizer",
    ]  # fmt: skip


def test_a_document_is_held_out_whatever_stands_around_it(sources, whole, tmp_path):
    run(tmp_path / "records", sources[1:])
    assert set(texts(tmp_path / "records", "validation")) & set(texts(whole[0], "train")) == set()
    assert set(texts(tmp_path / "records", "validation")) & set(texts(whole[0], "validation"))
    share = len(texts(whole[0], "validation")) / whole[1]["counts"]["read"]["documents"]
    assert 0.08 < share < 0.3


def test_several_processes_write_the_same_bytes(sources, whole, tmp_path):
    run(tmp_path / "out", sources, processes=2)
    assert contents(tmp_path / "out") == contents(whole[0])


class Killed(BaseException):
    """In the place of a signal."""


def test_it_goes_on_from_wherever_it_was_killed(sources, whole, tmp_path, monkeypatch):
    """Stopped at each renaming of a file in turn, before it and after it; and once more while it goes on."""
    replace, left = Path.replace, 0

    def stopping(self, target):
        nonlocal left
        left -= 1
        if left == 0 and moment % 2:
            raise Killed
        found = replace(self, target)
        if left == 0:
            raise Killed
        return found

    monkeypatch.setattr(Path, "replace", stopping)
    expected, stops = contents(whole[0]), 0
    for moment in range(1, 80, 9):
        output = tmp_path / str(moment)
        for stop in (moment, 3):
            left = stop
            try:
                run(output, sources)
            except Killed:
                stops += 1
        run(output, sources)
        assert contents(output) == expected
    assert stops == 2 * 9


def test_what_was_done_is_not_done_again(sources, tmp_path, monkeypatch):
    from lmx.preparation import prepare as module

    def stop(*arguments):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(module, "find_reasons", stop)
        with pytest.raises(Killed):
            run(tmp_path, sources)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(module, "write_indexes", stop)
        with pytest.raises(Killed):
            run(tmp_path, sources)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    cleaned = [name for name in before if not name.startswith("plan")]
    assert len(cleaned) > 20 and {name: after[name] for name in cleaned} == {name: before[name] for name in cleaned}


def test_the_same_again_changes_nothing_and_anything_else_is_refused(sources, tmp_path, capsys):
    run(tmp_path, sources)
    before = contents(tmp_path)
    prepare(settings(sources), schema.Tokenizer(), tmp_path, Console(), 1)
    assert "is prepared already" in capsys.readouterr().out
    with pytest.raises(DataError, match="prepared with other settings"):
        run(tmp_path, sources, similarity=0.9)
    assert contents(tmp_path) == before


def test_a_file_that_changed_meanwhile_is_noticed(tmp_path, monkeypatch):
    from lmx.preparation import prepare as module

    (tmp_path / "corpus").mkdir()
    sources = write_corpus(tmp_path / "corpus")

    def stop(*arguments):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(module, "find_reasons", stop)
        with pytest.raises(Killed):
            run(tmp_path / "out", sources)
    path = tmp_path / "corpus" / "texts" / "003.txt"
    path.write_text(path.read_text().replace("word", "wort"))
    with pytest.raises(DataError, match=r"since then this has changed: the content of \S+/003.txt"):
        run(tmp_path / "out", sources)
    with pytest.raises(DataError, match="this has changed: similarity, the content"):
        run(tmp_path / "out", sources, similarity=0.9)


def test_a_mistake_before_anything_is_done_is_mended_by_the_right_command(tmp_path):
    good, bad = b'{"text": "one two three four five six"}\n', b'{"text": \n'
    (tmp_path / "a.jsonl").write_bytes(good + bad)
    sources = [f"jsonl:{tmp_path / 'a.jsonl'}"]
    with pytest.raises(DataError, match="line 2 is not JSON"):
        run(tmp_path / "out", sources)
    with pytest.raises(DataError, match="has no field 'nope'.*--field"):
        run(tmp_path / "out", sources, reading=Reading("nope"))
    (tmp_path / "a.jsonl").write_bytes(good)
    assert run(tmp_path / "out", sources)["counts"]["read"]["documents"] == 1


@pytest.mark.parametrize("damage", ["flipped", "gone", "tokenizer"])
def test_what_is_damaged_is_made_again_to_the_bit(sources, whole, tmp_path, damage, capsys):
    folder, manifest = tmp_path / "out", whole[1]
    shutil.copytree(whole[0], folder)
    shard = folder / manifest["splits"]["train"]["shards"][1]["file"]
    if damage == "flipped":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "gone":
        shard.unlink()
    else:
        (folder / "tokenizer" / "lmx_tokenizer.json").write_text("{")
    prepare(settings(sources), schema.Tokenizer(), folder, Console(), 1)
    told = " ".join(capsys.readouterr().out.split())
    assert f"{'tokenizer' if damage == 'tokenizer' else shard.name} in" in told and "preparing the corpus again" in told
    assert contents(folder) == contents(whole[0])


def test_making_again_what_is_damaged_may_be_broken_off(sources, whole, tmp_path, monkeypatch):
    from lmx.preparation import prepare as module

    folder = tmp_path / "out"
    shutil.copytree(whole[0], folder)
    (folder / whole[1]["splits"]["train"]["shards"][1]["file"]).unlink()

    def stop(*arguments):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(module, "_run_here", stop)
        with pytest.raises(Killed):
            run(folder, sources)
    run(folder, sources)
    assert contents(folder) == contents(whole[0])


def test_sigterm_stops_it_with_a_word_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    from lmx.preparation import prepare as module

    (tmp_path / "a.jsonl").write_text('{"text": "one two three four five six"}')
    command = ["data", "prepare", "--source", f"jsonl:{tmp_path / 'a.jsonl'}", "--output", str(tmp_path / "out")]
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(module, "find_reasons", lambda job: os.kill(os.getpid(), signal.SIGTERM))
        assert cli.main(command) == 128 + signal.SIGTERM
    assert "the same command goes on" in " ".join(capsys.readouterr().out.split())
    assert signal.getsignal(signal.SIGTERM) == before
    assert cli.main(command) == 0 and "going on with" in capsys.readouterr().out


def test_a_corpus_of_which_nothing_is_left_says_so(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "too short"}')
    prepare(settings([f"jsonl:{tmp_path / 'a.jsonl'}"]), schema.Tokenizer(), tmp_path / "out", Console(), 1)
    assert "nothing is left: every document was dropped" in " ".join(capsys.readouterr().out.split())


def test_records_that_cannot_be_read_are_skipped_and_counted_if_asked_for(tmp_path, capsys):
    good = [f"number {i} of the documents that can be read" for i in range(6)]
    lines = [json.dumps({"text": text}).encode() for text in good]
    bad = [b'{"text": "cut sho', b'{"text": null}', b'{"other": "field"}', b'{"text": "caf\xe9"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([lines[0], *bad, *lines[1:]]) + b"\n")
    sources = (f"jsonl:{tmp_path}/a.jsonl",)
    with pytest.raises(DataError, match="line 2 is not JSON"):
        run(tmp_path / "strict", sources)
    reading = Reading(unreadable="skip")
    manifest = run(tmp_path / "one", sources, reading=reading, validation=0, part_bytes=10**6)
    assert texts(tmp_path / "one", "train") == good
    assert manifest["counts"]["read"]["documents"] == len(lines) + len(bad)
    skipped = manifest["counts"]["dropped"]["unreadable"]
    assert skipped["documents"] == len(bad) and "a.jsonl line 2 is not JSON" in skipped["first"]
    parts = run(tmp_path / "parts", sources, reading=reading, validation=0, part_bytes=60)
    assert texts(tmp_path / "parts", "train") == good
    assert parts["counts"]["dropped"]["unreadable"]["documents"] == len(bad)
    command = ["data", "prepare", "--source", sources[0], "--output", str(tmp_path / "out"), "--processes", "1"]
    assert cli.main([*command, "--unreadable", "skip"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "4 unreadable" in told and "warning: unreadable, the first:" in told and "line 2 is not JSON" in told


def test_texts_that_cannot_be_read_are_skipped_too(tmp_path):
    good = "six words that can be read"
    (tmp_path / "a.txt").write_text(good)
    (tmp_path / "b.txt").write_bytes(b"one two three four five caf\xe9")
    manifest = run(tmp_path / "out", (f"text:{tmp_path}",), reading=Reading(unreadable="skip"), validation=0)
    assert texts(tmp_path / "out", "train") == [good]
    assert manifest["counts"]["dropped"]["unreadable"]["documents"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"similarity": 2.0}, "similarity must be between 0.05 and 1, not 2.0"),
        ({"validation": -0.1}, "validation must be between 0 and 1"),
        ({"min_words": -1}, "min words must be at least 0"),
        ({"part_bytes": 0}, "part bytes must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(sources, tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        run(tmp_path / "out", sources, **changes)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_or_in_use_is_refused(sources, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="holds 'thesis.txt' already"):
        run(tmp_path, sources)
    import fcntl

    (tmp_path / "used").mkdir()
    with (tmp_path / "used" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="is being prepared by another process"):
            run(tmp_path / "used", sources)


def test_a_tokenizer_is_trained_on_what_is_left(sources, tmp_path):
    section = schema.Tokenizer(kind="sentencepiece", vocab_size=380)
    manifest = run(tmp_path / "a", sources, section)
    assert manifest["tokenizer"]["vocab_size"] == 380
    again = run(tmp_path / "b", sources, schema.Tokenizer(kind="sentencepiece", path=str(tmp_path / "a" / "tokenizer")))
    assert again["tokenizer"]["sha256"] == manifest["tokenizer"]["sha256"]
    assert again["splits"]["train"]["shards"] == manifest["splits"]["train"]["shards"]


def test_an_empty_split_is_warned_of_where_one_is_asked_for(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one document of more than five words")
    command = ["data", "prepare", "--source", f"text:{tmp_path}/a.txt", "--processes", "1", "--output"]
    assert cli.main([*command, str(tmp_path / "asked")]) == 0
    assert "warning: validation is empty" in capsys.readouterr().out
    assert cli.main([*command, str(tmp_path / "none"), "--validation", "0"]) == 0
    told = capsys.readouterr().out
    assert "warning" not in told and "1 shard\n" in told


def test_the_command_line(sources, tmp_path, capsys):
    command = ["data", "prepare", "--source", sources[0], "--source", sources[1], "--output", str(tmp_path / "out")]
    assert cli.main([*command, "--processes", "1", "--duplicates", "exact", "--steps", "none"]) == 0
    told = capsys.readouterr().out
    assert "160 documents read; dropped:" in told and "10 exact" in told and f"train on prepared:{tmp_path}/out" in told
    for wrong, message in (
        (["--steps", "cleen"], "no cleaning step 'cleen'"),
        (["--tokenizer", "none.model"], "there is no 'none.model'"),
        (["--processes", "0"], "--processes must be at least 1"),
        (["--config.train.steps=1"], "changes a config, and none is given"),
    ):
        assert cli.main([*command[:-1], str(tmp_path / "other"), *wrong]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "other").exists()
    assert cli.main(["data"]) == 2


def test_a_tokenizer_to_be_trained_does_not_go_with_a_runner(sources, tmp_path):
    section = schema.Tokenizer(kind="characters")
    with pytest.raises(DataError, match="train it with `lmx tokenizer` first"):
        prepare(settings(sources), section, tmp_path, Console(quiet=True), runner=lambda job: None)
    with pytest.raises(ConfigError, match="needs tokenizer.path"):
        prepare(
            settings(sources), schema.Tokenizer(kind="file"), tmp_path, Console(quiet=True), runner=lambda job: None
        )


@pytest.mark.exhaustive
def test_twenty_kills_at_random_moments(sources, whole, tmp_path):
    command = [sys.executable, "-m", "lmx", "data", "prepare", "--output", str(tmp_path / "out"), "--processes", "2"]
    command += ["--validation", "0.2", "--part-megabytes", "0.006", "--source", sources[0], "--source", sources[1]]
    rng, kills = random.Random(0), 0
    while True:
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(0.5, 6) if kills < 20 else None)
            if process.returncode == 0 and kills >= 20:
                break
            assert process.returncode == 0
            shutil.rmtree(tmp_path / "out")  # it was whole already: from the start again
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)  # its own processes must find out by themselves
            process.wait()
            kills += 1
            time.sleep(rng.choice([0, 0.2]))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == whole[1]
    assert contents(tmp_path / "out") == contents(whole[0])
