"""Parquet files and the datasets library: the records that were written, by index, and what is said about bad ones."""

import pickle
import sys

import pytest

from lmx.errors import DataError, LmxError
from lmx.text import columns
from lmx.text.corpora import open_source

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

RECORDS = [{"text": f"é {i}", "label": i % 3, "score": i / 4, "answers": {"text": [f"a{i}"]}} for i in range(1000)]


def records(source):
    return [source[i] for i in range(len(source))]


def only(*fields, of=RECORDS):
    return [{field: record[field] for field in fields} for record in of]


@pytest.fixture
def table(tmp_path):
    """a.parquet with records 0 to 599 in row groups of 70, b.parquet with the others in one, and what is neither."""
    for name, part, size in (("a", RECORDS[:600], 70), ("b", RECORDS[600:], 1000)):
        parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / f"{name}.parquet", row_group_size=size)
    (tmp_path / "notes.txt").write_text("no data")
    return tmp_path


@pytest.mark.parametrize("pattern", ["", "/*.parquet", "/[ab].parquet"])
def test_parquet_has_every_row_of_every_file_in_order(table, pattern):
    source = open_source(f"parquet:{table}{pattern}", ("text", "label", "score"))
    assert records(source) == only("text", "label", "score")


def test_parquet_slices_count_records(table):
    spec = f"parquet:{table}"
    both = [record for cut in ("[:59.95%]", "[59.95%:]") for record in records(open_source(spec + cut))]
    assert both == only("text")
    assert records(open_source(f"{spec}[598:602]")) == only("text", of=RECORDS[598:602])


def test_parquet_reads_the_columns_asked_for_and_paths_into_them(table):
    source = open_source(f"parquet:{table}/a.parquet", ("answers[text][0]",))
    assert source[599] == {"answers": {"text": ["a599"]}}
    with pytest.raises(IndexError):
        source[600]


def test_row_groups_beyond_the_cache_are_decoded_again(table, monkeypatch):
    monkeypatch.setattr(columns, "CACHE_BYTES", 1)
    source = open_source(f"parquet:{table}")
    order = [(i * 389) % 1000 for i in range(300)]
    assert [source[i] for i in order] == [{"text": RECORDS[i]["text"]} for i in order]
    assert len(source._records._tables) == 1


def test_parquet_records_can_be_sent_to_another_process(table):
    source = open_source(f"parquet:{table}")
    assert source[5] == {"text": "é 5"}
    assert records(pickle.loads(pickle.dumps(source))) == only("text")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ([{"txt": "a"}], "a.parquet has no field 'text'; did you mean 'txt'"),
        ([{"text": "a"}, {"text": None}], r"field 'text' of row group 0 of .* is missing in 1 rows"),
        ([{"text": ["a"]}], r"field 'text' of the first record .* is \['a'\], where a text or a number is due"),
    ],
)
def test_a_bad_parquet_file_is_an_error(tmp_path, rows, message):
    schema = None if rows else pyarrow.schema([("text", pyarrow.string())])
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        open_source(f"parquet:{tmp_path}/a.parquet")


def test_a_column_that_only_some_files_have_is_an_error(table):
    parquet.write_table(pyarrow.table({"txt": ["a"]}), table / "c.parquet")
    with pytest.raises(DataError, match="c.parquet has no field 'text'"):
        open_source(f"parquet:{table}")


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_truncated_parquet_file_is_an_error(table, keep):
    path = table / "a.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="a.parquet cannot be read as Parquet"):
        open_source(f"parquet:{path}")


def test_bytes_that_are_no_text_are_an_error(tmp_path):
    column = pyarrow.array([b"fine", b"caf\xe9"], pyarrow.binary())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    source = open_source(f"parquet:{tmp_path}/a.parquet")
    assert source[0] == {"text": "fine"}
    with pytest.raises(DataError, match="row 1 of row group 0 of .* is not UTF-8 text"):
        source[1]


@pytest.mark.parametrize(("scheme", "package"), [("parquet", "pyarrow"), ("hf", "datasets")])
def test_without_its_package_the_extra_is_named(monkeypatch, scheme, package):
    for name in (package, f"{package}.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    extra = {"pyarrow": "parquet", "datasets": "datasets"}[package]
    with pytest.raises(LmxError, match=rf"{package}.*pip install 'lmx\[{extra}\]'"):
        open_source(f"{scheme}:x.parquet")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """What the datasets library saves: one set, and one with splits."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    names = datasets.ClassLabel(names=["low", "middle", "high"])
    data = datasets.Dataset.from_list(RECORDS).cast_column("label", names)
    data.save_to_disk("whole")
    parts = {"train": data.select(range(900)), "validation": data.select(range(900, 1000))}
    datasets.DatasetDict(parts).save_to_disk("parts")
    return datasets


def test_folders_of_the_datasets_library_are_sources(folders):
    fields = ("text", "label")
    assert records(open_source("hf:whole", fields)) == only(*fields)
    assert records(open_source("hf:parts", fields)) == only(*fields, of=RECORDS[:900])
    assert records(open_source("hf:parts@validation[90%:]", fields)) == only(*fields, of=RECORDS[990:])
    assert open_source("hf:whole", fields).class_names == {"label": ("low", "middle", "high")}
    assert records(pickle.loads(pickle.dumps(open_source("hf:whole[:3]")))) == only("text", of=RECORDS[:3])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:parts@validatoin", "no split 'validatoin'; did you mean 'validation'"),
        ("hf:whole@train", "'whole' has no splits; leave out @train"),
        ("hf:.", "the datasets library cannot provide '.'"),
    ],
)
def test_a_bad_folder_is_an_error(folders, spec, message):
    with pytest.raises(DataError, match=message):
        open_source(spec)
    with pytest.raises(DataError, match="no field 'txt'; did you mean 'text'"):
        open_source("hf:whole", ("txt",))


def test_names_on_the_hub_have_an_organization_or_a_config_or_both(folders, monkeypatch):
    asked = []

    def load(*names):
        asked.append(names)
        if names in (("glue/sst2",), ("nothing",)):
            raise folders.exceptions.DatasetNotFoundError(f"{names} is not there")
        return folders.load_from_disk("parts")

    monkeypatch.setattr(folders, "load_dataset", load)
    for name in ("imdb", "org/imdb", "glue/sst2", "org/glue/sst2"):
        assert len(open_source(f"hf:{name}@validation")) == 100
    assert asked == [("imdb",), ("org/imdb",), ("glue/sst2",), ("glue", "sst2"), ("org/glue", "sst2")]
    with pytest.raises(DataError, match="cannot provide 'nothing': .* is not there"):
        open_source("hf:nothing")
