"""The source ``prepared:``: the same rows as from the text, without tokenizing, and nothing from a damaged folder."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("rensa")

from lmx.config import Config
from lmx.config import Tokenizer as Section
from lmx.errors import ConfigError, DataError
from lmx.text.corpora import open_source
from lmx.text.packing import Cut, TokenStore
from lmx.text.tokenizers import ByteTokenizer, CharacterTokenizer, Tokenizer, load_tokenizer
from lmx.training.experiment import build
from tests.preparation.corpora import run, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("corpus")
    run(base / "out", write_corpus(base))
    return base / "out"


@pytest.mark.parametrize("cut", ["", "[:50%]", "[50%:]", "[7:20]"])
def test_rows_are_those_of_the_text(folder, cut, monkeypatch):
    source = open_source(f"prepared:{folder}{cut}")
    texts = [source[i]["text"] for i in range(len(source))]
    tokenizer = ByteTokenizer()
    expected = [ids for text in texts for ids in [tokenizer.encode_batch([text])[0]]]
    offsets = np.cumsum([0, *map(len, expected)])
    from_text = TokenStore(np.concatenate(expected), offsets)

    def never(*arguments):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(Tokenizer, "encode_batch", never)
    store = TokenStore.build(source, tokenizer, "text")
    assert np.array_equal(store.tokens[0 : 10**9], from_text.tokens)
    again = pickle.loads(pickle.dumps(store))  # as a worker process is sent it
    for settings in (Cut(33, overlap=1, before=(1,)), Cut(64, split=False, before=(1,), after=(2,))):
        rows, others = store.rows(settings), from_text.rows(settings)
        assert len(rows) == len(others) > 3
        for i in (0, len(rows) // 2, len(rows) - 1):
            for name, values in others[i].items():
                assert np.array_equal(rows[i][name], values) and np.array_equal(again.rows(settings)[i][name], values)
    for seed in range(20):
        drawn = [one.sample(np.random.default_rng(seed), 9).tolist() for one in (store, from_text)]
        assert drawn[0] == drawn[1]


def test_its_files_are_all_that_a_split_is_read_from(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    for split, found in manifest["splits"].items():
        names = ["manifest.json", f"{split}.index", *(shard["file"] for shard in found["shards"])]
        assert [path.name for path in open_source(f"prepared:{folder}@{split}").files] == names


def test_slices_are_documents_and_meet(folder):
    whole, first, second = (open_source(f"prepared:{folder}{cut}") for cut in ("", "[:33%]", "[33%:]"))
    assert len(first) + len(second) == len(whole)
    assert [*first, *second] == [*whole]
    held_out = open_source(f"prepared:{folder}@validation")
    assert not {record["text"] for record in held_out} & {record["text"] for record in whole}


def config(folder: Path, **tokenizer) -> Config:
    values = {"train": f"prepared:{folder}", "eval": f"prepared:{folder}@validation", "length": 32}
    model = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "mlp_dim": 16}
    return Config().replace(data=values, tokenizer=tokenizer, train={"global_batch_size": 8}, model=model)


def test_a_config_trains_on_it_with_the_tokenizer_of_the_folder(folder, tmp_path):
    experiment = build(config(folder), tmp_path, Console(quiet=True))
    assert experiment.tokenizer.fingerprint() == ByteTokenizer().fingerprint()
    batch = next(iter(experiment.train_batches()))
    assert batch["tokens"].shape == (8, 32) and batch["tokens"].max() < ByteTokenizer().vocab_size
    assert sum(int(batch["weights"].sum()) for batch in experiment.eval_batches()) > 1000
    by_path = build(config(folder, path=str(folder / "tokenizer")), tmp_path, Console(quiet=True))
    assert by_path.tokenizer.fingerprint() == experiment.tokenizer.fingerprint()


def test_another_tokenizer_is_an_error_that_names_it(folder, tmp_path):
    with pytest.raises(ConfigError, match="tokenizer.lowercase is True here and False there.*Set tokenizer.path="):
        build(config(folder, lowercase=True), tmp_path, Console(quiet=True))
    with pytest.raises(ConfigError, match="tokenizer.kind is 'sentencepiece' here and 'bytes' there"):
        build(config(folder, kind="sentencepiece"), tmp_path, Console(quiet=True))
    CharacterTokenizer("abc").save(tmp_path / "other")
    with pytest.raises(ConfigError, match="tokenizer.path='.*other' is another"):
        build(config(folder, kind="characters", path=str(tmp_path / "other")), tmp_path, Console(quiet=True))
    with pytest.raises(ConfigError, match="tokens of another tokenizer"):
        TokenStore.build(open_source(f"prepared:{folder}"), CharacterTokenizer("abc"), "text")


@pytest.mark.parametrize("kind", ["bytes", "characters", "sentencepiece"])
def test_a_fingerprint_outlives_saving(kind, tmp_path):
    from lmx.text.tokenizers import make_tokenizer

    tokenizer = make_tokenizer(
        Section(kind=kind, vocab_size=286),
        lambda: ["some text to be trained on, and the rest of all the words that make it long"] * 3,
    )
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint() == tokenizer.fingerprint() != ByteTokenizer(3).fingerprint()


def broken(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_damaged_folder_is_an_error(folder, tmp_path):
    copy = broken(folder, tmp_path)
    shard = copy / json.loads((copy / "manifest.json").read_text())["splits"]["train"]["shards"][1]["file"]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(DataError, match="bytes, not .*: it was cut short or changed"):
        open_source(f"prepared:{copy}")
    shard.write_bytes(bytes(len(content)))
    source = open_source(f"prepared:{copy}")
    with pytest.raises(DataError, match="is damaged"):
        for i in range(len(source)):
            source[i]
    shard.unlink()
    with pytest.raises(DataError, match="is missing"):
        open_source(f"prepared:{copy}")
    (copy / "manifest.json").unlink()
    with pytest.raises(DataError, match="holds manifest.json, and .* has none"):
        open_source(f"prepared:{copy}")
    (copy / "work").mkdir()
    with pytest.raises(DataError, match="is not finished: run the same"):
        open_source(f"prepared:{copy}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["splits"]["train"]["index"].update(file="../../secret"), "'../../secret' is none of this folder"),
        (
            lambda m: m["splits"]["train"]["shards"][0].update(file="/etc/passwd"),
            "'/etc/passwd' is none of this folder",
        ),
        (lambda m: m["splits"]["train"]["shards"][0].update(documents=2**60), "do not add up"),
        (lambda m: m["splits"]["train"].update(documents=-1), "a count that is none"),
        (lambda m: m["splits"].update(train=[]), "is damaged"),
        (lambda m: m.update(format=9), "format 9, where 1 is known"),
        (lambda m: m.pop("tokenizer"), "KeyError"),
    ],
)
def test_a_manifest_is_checked(folder, tmp_path, change, message):
    copy = broken(folder, tmp_path)
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=message):
        open_source(f"prepared:{copy}")


def test_a_split_that_is_not_there_is_named(folder):
    with pytest.raises(DataError, match="no split 'validatoin'; did you mean 'validation'"):
        open_source(f"prepared:{folder}@validatoin")
