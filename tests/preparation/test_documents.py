"""Parts: every document exactly once, whatever the size of a part."""

import gzip
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmx.errors import DataError
from lmx.preparation import documents
from lmx.preparation.documents import Reading, describe_files, plan_parts, read_part, source_files
from lmx.text.corpora import open_source

WHOLE_FILES = Reading()


def all_texts(spec: str, part_bytes: int, reading: Reading = WHOLE_FILES) -> tuple[list[str], int]:
    parts = plan_parts([spec], reading, part_bytes)
    return [text for part in parts for text in read_part(part, reading)], len(parts)


@pytest.fixture
def corpus(tmp_path):
    """Files of random lines with characters of one to four bytes; some empty, one packed."""
    rng = random.Random(0)
    files = {}
    for number in range(12):
        lines = ["".join(rng.choices("ab é€😀", k=rng.randrange(30))) for _ in range(rng.choice([0, 1, 5, 40]))]
        files[f"{number:02d}.txt"] = "\n".join(lines) + rng.choice(["", "\n"])
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "99.txt.gz").write_bytes(gzip.compress(b"packed\nlines"))
    return tmp_path, [text for text in files.values() if text] + ["packed\nlines"]


@pytest.mark.parametrize("part_bytes", [1, 7, 100, 1000, 10**6])
def test_parts_hold_every_file_once(corpus, part_bytes):
    folder, expected = corpus
    found, parts = all_texts(f"text:{folder}", part_bytes)
    assert "".join(found) == "".join(expected)
    assert (parts > 20) == (part_bytes <= 100)
    if part_bytes > 1000:
        assert found == expected


@pytest.mark.parametrize("part_bytes", [1, 50, 10**6])
def test_lines_are_documents_where_asked(corpus, part_bytes):
    folder, expected = corpus
    found, _ = all_texts(f"text:{folder}", part_bytes, Reading(documents="line"))
    assert found == [line for text in expected for line in text.splitlines(keepends=True)]


@pytest.mark.parametrize("part_bytes", [1, 100, 10**6])
def test_json_lines_in_ranges(tmp_path, part_bytes):
    records = [{"text": "x" * (i % 9) + "é", "n": i} for i in range(50)]
    path = tmp_path / "r.jsonl"
    path.write_text("\n\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    found, _ = all_texts(f"jsonl:{path}", part_bytes)
    assert found == [record["text"] for record in records]


def test_what_is_sliced_or_no_file_is_read_by_records(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("0123456789")
    assert all_texts(f"text:{path}[2:5]", 10) == (["234"], 1)
    topics, parts = all_texts("builtin:python_manual", 10)
    assert (len(topics), parts) == (79, 1)
    assert source_files(f"text:{path}") == [path]
    assert source_files(f"text:{path}[2:5]") == []


def test_a_long_document_is_cut_at_the_end_of_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 10)
    path = tmp_path / "a.txt"
    path.write_text("abc\ndef\nghi\njkl\n€€€€€€€\nend")
    found, _ = all_texts(f"text:{path}", 10**6)
    assert found == ["abc\ndef\nghi\n", "jkl\n€€€€", "€€€\n", "end"]
    monkeypatch.setattr(documents, "LONGEST_LINE", 20)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "x" * 30}))
    with pytest.raises(DataError, match="line of more than 20 bytes at offset 0"):
        all_texts(f"jsonl:{tmp_path}/b.jsonl", 10**6)


ODD_LINES = [
    rb'{"text": "\ud800"}',
    rb'{"text": "\ud83d\ude00 \u00e9"}',
    b'{"text": "caf\xe9"}',
    b'{"text": "a\tb"}',
    b'{"text": "a", "text": "b"}',
    b'{"text": "a", "n": NaN}',
    b'{"text": "a", "n": ' + b"9" * 30 + b"}",
    b'{"text": null}',
    b'{"other": "a"}',
    b'["text"]',
    b'"text"',
    b'\xef\xbb\xbf{"text": "a"}',
    b'{"text": "a"} x',
    b" \t\r",
]
VALUES = st.one_of(st.text('ab\n\t\0\x7f"\\/é€😀'), st.integers(), st.none())
RECORDS = st.dictionaries(st.sampled_from(["text", "other"]), VALUES)


def texts_or_error(path):
    try:
        return all_texts(f"jsonl:{path}", 10**6)
    except DataError as error:
        return str(error)


def assert_the_fast_parser_changes_nothing(folder, line):
    path = folder / "r.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + line)
    found = texts_or_error(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "orjson", None)
        assert found == texts_or_error(path)


@pytest.mark.parametrize("line", ODD_LINES, ids=repr)
def test_odd_lines_are_what_they_are_to_the_strict_parser(tmp_path, line):
    assert_the_fast_parser_changes_nothing(tmp_path, line)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RECORDS, st.booleans())
def test_records_are_what_they_are_to_the_strict_parser(tmp_path, record, ascii_only):
    assert_the_fast_parser_changes_nothing(tmp_path, json.dumps(record, ensure_ascii=ascii_only).encode())


def test_a_file_may_begin_with_a_mark_of_its_byte_order(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n')
    assert all_texts(f"jsonl:{path}", 10**6)[0] == ["a", "b"]
    records = open_source(f"jsonl:{path}")
    assert [records[i]["text"] for i in range(len(records))] == ["a", "b"]


def test_bad_sources_say_why(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"line\ncaf\xe9")
    with pytest.raises(DataError, match="not UTF-8 text: byte 0xe9 at offset 8"):
        all_texts(f"text:{tmp_path}/bad.txt", 5)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(DataError, match="field 'text' of .*line 2 is 1, where a text is due"):
        all_texts(f"jsonl:{tmp_path}/bad.jsonl", 10**6)
    with pytest.raises(DataError, match="line 1 after byte 14"):
        all_texts(f"jsonl:{tmp_path}/bad.jsonl", 14)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="empty.txt' is empty"):
        all_texts(f"text:{tmp_path}/empty.txt", 10)
    with pytest.raises(DataError, match="is a mixture"):
        plan_parts(["1*builtin:python_manual + 1*builtin:python_manual"], Reading(), 10)
    (tmp_path / "bad.txt.gz").write_bytes(gzip.compress(b"x" * 999)[:-20])
    with pytest.raises(DataError, match="bad.txt.gz cannot be read"):
        all_texts(f"text:{tmp_path}/bad.txt.gz", 10)


def test_files_are_described_by_their_content(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc")
    (found,) = describe_files([tmp_path / "a.txt"])
    assert found == {
        "path": str(tmp_path / "a.txt"),
        "bytes": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
