"""Source strings: what each kind opens, slices, mixtures, and what is said about bad ones."""

import gzip
import json
import lzma
import subprocess
import sys

import pytest

from lmx.errors import DataError, LmxError
from lmx.text.corpora import open_source

PAIR = ("source", "target")


def texts(spec: str) -> list[str]:
    source = open_source(spec)
    return [source[i]["text"] for i in range(len(source))]


@pytest.fixture
def letters(tmp_path, monkeypatch):
    """Files a.txt (abcde), b.txt (empty), c.txt (fghij) in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, content in {"a": "abcde", "b": "", "c": "fghij"}.items():
        (tmp_path / f"{name}.txt").write_text(content)
    return tmp_path


@pytest.fixture
def numbers(tmp_path, monkeypatch):
    """Ten records in numbers.jsonl."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numbers.jsonl").write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(10)))
    return tmp_path


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ("", ["abcde", "fghij"]),
        ("[:]", ["abcde", "fghij"]),
        ("[:90%]", ["abcde", "fghi"]),
        ("[90%:]", ["j"]),
        ("[:3]", ["abc"]),
        ("[5:]", ["fghij"]),
        ("[-3:]", ["hij"]),
        ("[:-8]", ["ab"]),
        ("[4:6]", ["e", "f"]),
        ("[-10%:]", ["j"]),
        ("[12.5%:50%]", ["bcde"]),
        ("[-99:2]", ["ab"]),
        ("[0:1_0]", ["abcde", "fghij"]),
    ],
)
def test_text_slices_count_characters_over_all_files(letters, cut, expected):
    assert texts(f"text:*.txt{cut}") == expected


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        ("", "0123456789"),
        ("[:90%]", "012345678"),
        ("[90%:]", "9"),
        ("[2:4]", "23"),
        ("[:-5]", "01234"),
        ("[25%:]", "23456789"),
    ],
)
def test_other_slices_count_records(numbers, cut, expected):
    assert "".join(texts(f"jsonl:numbers.jsonl{cut}")) == expected


@pytest.mark.parametrize("percent", [1, 33, 50, 66.6, 99])
def test_two_complementary_slices_are_the_whole(numbers, percent):
    (numbers / "long.txt").write_text("".join(chr(97 + i % 26) for i in range(997)))
    for spec in ("text:long.txt", "builtin:python_manual"):
        assert "".join(texts(f"{spec}[:{percent}%]") + texts(f"{spec}[{percent}%:]")) == "".join(texts(spec))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("text:*.txt[:90%", r"no file '\*\.txt\[:90%'"),
        ("text:*.txt[90%]", r"no file .* \(a slice has a colon"),
        ("text:*.txt[1:2:3]", r"slice \[1:2:3\] cannot be read.*\[:90%\]"),
        ("text:*.txt[:x]", r"slice \[:x\] cannot be read"),
        ("text:*.txt[:1.5]", r"slice \[:1.5\] cannot be read"),
        ("builtin:python_manual[5]", r"slice \[5\] cannot be read"),
        ("text:*.txt[:11]", r"\[:11\] reaches beyond the 10 characters"),
        ("text:*.txt[:101%]", r"slice \[:101%\] cannot be read"),
        ("text:*.txt[3:3]", r"\[3:3\] of .* is empty: it has 10 characters"),
        ("builtin:python_manual[:0.1%]", r"is empty: it has \d+ records"),
        ("text:a.txt,jsonl:b.jsonl", r"SOURCE \+ SOURCE"),
        ("txet:a.txt", r"no kind 'txet'.*did you mean 'text'"),
        ("a.txt", r"a source is builtin:NAME, text:PATH"),
        ("builtin:python_manua", r"did you mean 'python_manual'"),
        ("builtin:copy", r"no field 'text'"),
        ("text:none.txt", r"no file 'none.txt', seen from "),
        ("text:b.txt", r"'text:b.txt' is empty"),
        ("text:folder", r"no file ending in \.txt, .* in the folder 'folder'"),
        ("jsonl:none.jsonl", r"no file 'none.jsonl'"),
        ("jsonl:b.txt", r"'jsonl:b.txt' is empty"),
        ("0.5*text:a.txt + text:c.txt", r"'text:c.txt' in the mixture .* has no positive weight"),
        ("0*text:a.txt + 1*text:c.txt", r"'0\*text:a.txt' .* no positive weight"),
        ("1e999*text:a.txt + 1*text:c.txt", r"no positive weight"),
    ],
)
def test_a_bad_source_is_an_error_that_says_why(letters, spec, message):
    (letters / "folder").mkdir()
    with pytest.raises(DataError, match=message):
        open_source(spec)


def test_compressed_files_and_folders_are_read(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "b.txt").write_bytes(b"second\r\n")
    (tmp_path / "deep" / "er" / "d.md.xz").write_bytes(lzma.compress("fourth é".encode()))
    (tmp_path / "deep" / "c.txt.gz").write_bytes(gzip.compress(b"third"))
    (tmp_path / "a.rst").write_text("first")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert texts(f"text:{tmp_path}") == ["first", "second\r\n", "third", "fourth é"]
    assert texts(f"text:{tmp_path}/**/*.gz") == ["third"]
    (tmp_path / "records.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zipped"}'))
    assert texts(f"jsonl:{tmp_path}/records.jsonl.gz") == ["zipped"]


def test_a_file_name_may_hold_brackets_and_a_glob_may_end_in_a_class(tmp_path):
    for name in ("part0", "part1", "partx", "odd[1]"):
        (tmp_path / name).write_text(name)
    assert texts(f"text:{tmp_path}/part[0-9]") == ["part0", "part1"]
    assert texts(f"text:{tmp_path}/odd[1]") == ["odd[1]"]
    assert texts(f"text:{tmp_path}/part[0-9][5:]") == ["part1"]


@pytest.mark.parametrize("name", ["bad.gz", "bad.xz"])
def test_a_damaged_archive_is_an_error(tmp_path, name):
    whole = gzip.compress(b"x" * 999) if name.endswith("gz") else lzma.compress(b"x" * 999)
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        open_source(f"text:{tmp_path}/{name}")


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin.txt is not UTF-8 text: byte 0xe9 at offset 3"):
        open_source(f"text:{tmp_path}/latin.txt")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl is not UTF-8 text: byte 0xe9 at offset 25"):
        open_source(f"jsonl:{tmp_path}/latin.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"line 3 is not JSON: Expecting value at column 10"),
        ('["text"]', r"line 3 is not an object with fields but list"),
        ('{"txt": "a"}', r"line 3 has no field 'text'; did you mean 'txt'"),
        ('{"text": null}', r"field 'text' of .*line 3 is None"),
        ('{"text": ["a"]}', r"field 'text' of .*line 3 is \['a'\], where a text or a number is due"),
        (r'{"text": "\ud83d"}', r"line 3 holds half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_when_the_file_is_opened(tmp_path, line, message):
    (tmp_path / "r.jsonl").write_text('{"text": "fine"}\n\n' + line + '\n{"text": "fine"}\n')
    with pytest.raises(DataError, match=message):
        open_source(f"jsonl:{tmp_path}/r.jsonl")


def test_json_lines_keep_all_fields_and_pass_over_blank_lines(tmp_path):
    records = [{"text": "a\nb", "label": 0}, {"text": "\U0001f600", "label": "x", "more": [1]}]
    (tmp_path / "r.jsonl").write_text("\n".join(["", *map(json.dumps, records), "  ", ""]))
    source = open_source(f"jsonl:{tmp_path}/r.jsonl", ("text", "label"))
    assert [source[i] for i in range(len(source))] == records
    with pytest.raises(IndexError):
        source[2]


def test_the_manual_is_every_topic_once_in_mixed_order():
    from pydoc_data.topics import topics

    found = texts("builtin:python_manual")
    assert sorted(found) == sorted(topics.values())
    assert found != [topics[name] for name in sorted(topics)]
    assert texts("builtin:python_manual[90%:]") == found[round(0.9 * len(found)) :]


def test_synthetic_words_follow_from_their_index():
    copy, reverse = open_source("builtin:copy", PAIR), open_source("builtin:reverse[50000:]", PAIR)
    assert copy[5] == {"source": "tuytxamyq", "target": "tuytxamyq"}  # in every Python version
    assert reverse[7]["source"] == copy[50007]["source"] == reverse[7]["target"][::-1]
    assert {len(copy[i]["source"]) for i in range(500)} == set(range(3, 13))
    assert (len(copy), len(reverse)) == (100_000, 50_000)
    assert len({copy[i]["source"] for i in range(500)}) > 490


def test_a_mixture_holds_normalized_weights_and_is_its_sources_in_order(letters, numbers):
    mixture = open_source("3*text:?.txt[:8] + 1 * jsonl:numbers.jsonl[8:]")
    assert mixture.weights == (0.75, 0.25)
    assert [len(source) for source in mixture.sources] == [2, 2]
    assert [mixture[i]["text"] for i in range(len(mixture))] == ["abcde", "fgh", "8", "9"]
    with pytest.raises(IndexError):
        mixture[4]
    single = open_source("text:a.txt")
    assert (single.sources, single.weights) == ((single,), (1.0,))


@pytest.fixture
def tfds_folder(tmp_path, monkeypatch):
    """A prepared data set of three training and two validation records."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class LmxToy(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["no", "yes"])}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples("abc"), "validation": self._generate_examples("dé")}

        def _generate_examples(self, letters):
            for i, letter in enumerate(letters):
                yield i, {"text": letter, "label": i % 2}

    LmxToy(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return tmp_path


def test_tfds_splits_are_sources(tfds_folder, capsys):
    source = open_source("tfds:lmx_toy", ("text", "label"))
    records = [source[i] for i in range(len(source))]
    assert sorted(record["text"] for record in records) == ["a", "b", "c"]
    assert {record["text"]: record["label"] for record in records} == {"a": 0, "b": 1, "c": 0}
    assert all(type(record["label"]) is int for record in records)
    assert sorted(texts("tfds:lmx_toy@validation")) == ["d", "é"]
    assert texts("tfds:lmx_toy@validation[:1]") + texts("tfds:lmx_toy@validation[1:]") == texts(
        "tfds:lmx_toy@validation"
    )
    with pytest.raises(DataError, match="no split 'validatoin'; did you mean 'validation'"):
        open_source("tfds:lmx_toy@validatoin")
    with pytest.raises(DataError, match="no field 'content'"):
        open_source("tfds:lmx_toy", ("content",))
    with pytest.raises(DataError, match="TFDS cannot provide 'no_such_set_of_data'"):
        open_source("tfds:no_such_set_of_data")
    assert "downloading" not in capsys.readouterr().err


def test_tfds_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(LmxError, match=r"pip install 'lmx\[tfds\]'"):
        open_source("tfds:lmx_toy")


def test_importing_the_room_loads_nothing_heavy():
    heavy = {"grain", "sentencepiece", "tokenizers", "tensorflow_datasets", "tensorflow", "torch", "transformers"}
    code = f"import sys, lmx.text.pipeline, lmx.text.tokenizers, lmx.text.subwords; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
