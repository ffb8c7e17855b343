"""TFDS without TensorFlow and without a network: the table of well-known sets, and sets made of one's own sources."""

import json
import sys

import pytest

from lmx.errors import DataError, LmxError
from lmx.text.builders import prepare_tfds
from lmx.text.corpora import open_source
from lmx.text.readers import import_tfds
from lmx.text.templates import Template
from lmx.text.tfds_fields import TFDS_FIELDS, tfds_fields

tfds = pytest.importorskip("tensorflow_datasets")

CONFIGS = {"c4": "en", "wikipedia": "20230601.en", "wmt_t2t_translate": "de-en"}
CONFIGS |= {f"wmt{year}_translate": "cs-en" for year in range(13, 20)}


def declared(name, folder):
    """The builder as TFDS declares it; making it downloads nothing."""
    import_tfds("the test")
    return tfds.builder(name, file_format="array_record", data_dir=folder)


def invented(feature, number):
    """A value that a feature can hold."""
    if isinstance(feature, tfds.features.FeaturesDict):
        return {
            name: f"{name} {number}" if is_text(inner) else invented(inner, number) for name, inner in feature.items()
        }
    if isinstance(feature, tfds.features.Sequence):
        return [invented(feature.feature, number)]
    return number % feature.num_classes if isinstance(feature, tfds.features.ClassLabel) else number


def is_text(feature):
    return feature.np_dtype in (str, object, bytes)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Prepares a data set with three invented training examples, by its name."""

    def prepare(name):
        builder = declared(name, tmp_path)
        examples = [(number, invented(builder.info.features, number)) for number in range(3)]
        monkeypatch.setattr(builder, "_split_generators", lambda manager: {"train": iter(examples)}, raising=True)
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(download_config=config)

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return prepare


@pytest.mark.parametrize("name", TFDS_FIELDS)
def test_the_table_names_features_that_the_set_has(name, tmp_path):
    name = f"{name}/{CONFIGS[name]}" if name in CONFIGS else name
    features = declared(name, tmp_path).info.features
    fields = tfds_fields(f"{name}:1.0.0@train[:10%]")
    assert fields == tfds_fields(name) and fields
    for text in fields.values():
        for path in Template(text).paths:
            assert path.partition("[")[0] in features
    assert ("label" in fields) == ("label" in features)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("glue/sst2", {"text": "sentence 1", "label": 1}),
        ("glue/mrpc", {"text": "sentence1 1", "pair": "sentence2 1", "label": 1}),
        ("wmt14_translate/de-en", {"source": "de 1", "target": "en 1"}),
        ("squad", {"source": "question: question 1 context: context 1", "target": "text 1"}),
    ],
)
def test_a_well_known_set_has_the_fields_of_the_objectives(prepared, name, expected):
    prepared(name)
    source = open_source(f"tfds:{name}@train", tuple(expected))
    records = sorted(({field: source[i][field] for field in expected} for i in range(3)), key=str)
    assert records[1] == expected
    own = next(path for path in Template(next(iter(tfds_fields(name).values()))).paths)
    named = open_source(f"tfds:{name}", (own,))  # a feature is read by its own name too
    assert sorted(named[i][own] for i in range(3)) == [f"{own} {i}" for i in range(3)]


def test_the_names_of_classes_come_with_the_set(prepared):
    prepared("glue/sst2")
    source = open_source("tfds:glue/sst2[:2]", ("text", "label"))
    assert source.class_names == {"label": ("negative", "positive")}


def test_a_set_that_is_not_in_the_table_has_its_own_fields_only():
    assert tfds_fields("wmt14_translate") == {}
    assert tfds_fields("no_such_set") == {}


@pytest.fixture
def numbers(tmp_path):
    records = [{"text": f"é {i}", "label": i % 3, "score": i / 2} for i in range(40)]
    (tmp_path / "numbers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def test_own_sources_become_a_set_with_the_same_records(numbers, tmp_path, monkeypatch):
    source, fields = f"jsonl:{tmp_path}/numbers.jsonl", ("text", "label", "score")
    folder = prepare_tfds("numbers", {"train": f"{source}[:75%]", "test": f"{source}[75%:]"}, tmp_path, fields)
    assert folder == tmp_path / "numbers" / "1.0.0"
    assert any(path.name.startswith("numbers-train.array_record") for path in folder.iterdir())
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for spec in ("tfds:numbers", f"tfds:{folder}"):
        train, test = open_source(spec, fields), open_source(f"{spec}@test", fields)
        assert [train[i] for i in range(len(train))] == numbers[:30]  # in their order
        assert [test[i] for i in range(len(test))] == numbers[30:]
    assert open_source("tfds:numbers[10:12]", fields)[0] == numbers[10]
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("Numbers", [{"text": "a"}], "named by lower-case letters"),
        (
            "numbers",
            [{"text": "a"}, {"text": 5}],
            "field 'text' of record 1 of .* is 5, where the first one has str",
        ),
    ],
)
def test_a_set_that_cannot_be_written_is_an_error(tmp_path, name, lines, message):
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=message):
        prepare_tfds(name, {"train": f"jsonl:{tmp_path}/r.jsonl"}, tmp_path)
    assert not (tmp_path / "numbers" / "1.0.0").exists()


def test_writing_without_the_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(LmxError, match=r"pip install 'lmx\[tfds\]'"):
        prepare_tfds("numbers", {"train": "builtin:python_manual"}, tmp_path)
