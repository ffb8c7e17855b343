"""Rows: no token lost, none doubled, segments and positions right, for random documents and every way to cut."""

import numpy as np
import pytest

from lmx.errors import ConfigError, DataError
from lmx.text.corpora import Records
from lmx.text.packing import Cut, TokenStore, token_store
from lmx.text.tokenizers import ByteTokenizer

BEFORE, AFTER = (-1, -2), (-3,)


def random_store(seed: int, longest: int = 40) -> tuple[TokenStore, list[np.ndarray]]:
    """Documents of 1 to ``longest`` tokens; every token of the store is another number."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, size=rng.integers(1, 30))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    store = TokenStore(np.arange(offsets[-1], dtype=np.int32), offsets)
    return store, np.split(store.tokens, offsets[1:-1])


def segments_of(row: dict[str, np.ndarray]) -> list[list[int]]:
    """The tokens of each segment, after checking that segments and positions are numbered as they must be."""
    assert {name: (values.dtype, values.shape) for name, values in row.items()} == dict.fromkeys(
        ("tokens", "segments", "positions"), (np.dtype(np.int32), row["tokens"].shape)
    )
    count = row["segments"][-1]
    assert np.array_equal(np.unique(row["segments"]), np.arange(1, count + 1))
    assert np.all(np.diff(row["segments"]) >= 0)
    parts = [np.flatnonzero(row["segments"] == segment) for segment in range(1, count + 1)]
    assert np.array_equal(row["positions"], np.concatenate([np.arange(len(part)) for part in parts]))
    return [row["tokens"][part].tolist() for part in parts]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("overlap", [0, 1, 3])
@pytest.mark.parametrize("before", [(), BEFORE])
def test_split_rows_are_the_stream_of_documents(seed, overlap, before):
    store, documents = random_store(seed)
    cut = Cut(length=8, overlap=overlap, before=before, after=AFTER)
    stream = np.concatenate([np.concatenate([before, document, AFTER]) for document in documents]).astype(int).tolist()
    rows = store.rows(cut)
    stride = cut.length - overlap
    assert len(rows) == -(-len(stream) // stride)
    assert [rows[i]["tokens"].tolist() for i in range(len(rows))] == [
        stream[start : start + cut.length] for start in range(0, len(stream), stride)
    ]
    assert [token for i in range(len(rows)) for token in rows[i]["tokens"][:stride].tolist()] == stream


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("packing", [True, False])
def test_segments_of_split_rows_are_the_documents(seed, packing):
    store, documents = random_store(seed)
    ends = {int(document[-1]) for document in documents}
    for row in store.rows(Cut(length=16, packing=packing)):
        segments = segments_of(row)
        assert packing or len(segments) == 1
        for segment in segments:
            assert not ends & set(segment[:-1])  # no document goes on behind its end
        for segment in segments[:-1]:
            assert segment[-1] in ends


@pytest.mark.parametrize("seed", range(5))
def test_unpacked_split_rows_are_windows_of_single_documents(seed):
    store, documents = random_store(seed)
    rows = store.rows(Cut(length=8, overlap=1, before=(-1,), packing=False))
    expected = []
    for document in documents:
        whole = [-1, *document.tolist()]
        expected += [whole[start : start + 8] for start in range(0, len(whole), 7)]
    assert [row["tokens"].tolist() for row in rows] == expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("packing", [True, False])
def test_whole_rows_hold_every_piece_once(seed, packing):
    store, documents = random_store(seed)
    cut = Cut(length=16, split=False, before=BEFORE, after=AFTER, packing=packing)
    room = 13
    pieces = [document[start : start + room] for document in documents for start in range(0, len(document), room)]
    wrapped = [[*BEFORE, *piece.tolist(), *AFTER] for piece in pieces]
    rows = [segments_of(row) for row in store.rows(cut)]
    assert [segment for row in rows for segment in row] == wrapped
    sizes = [sum(map(len, row)) for row in rows]
    assert max(sizes) <= cut.length
    if packing:  # next-fit: the first piece of the next row would not have fitted
        assert all(size + len(after[0]) > cut.length for size, after in zip(sizes, rows[1:], strict=False))
    else:
        assert all(len(row) == 1 for row in rows)


def test_many_short_documents_share_a_row():
    store = TokenStore(np.arange(10, dtype=np.int32), np.arange(11))
    (row,) = store.rows(Cut(length=30, split=False, after=(-1,)))
    assert row["segments"].tolist() == np.repeat(np.arange(1, 11), 2).tolist()
    assert row["positions"].tolist() == [0, 1] * 10


def test_an_index_beyond_the_rows_is_an_error():
    store, _ = random_store(0)
    for cut in (Cut(length=8), Cut(length=8, split=False), Cut(length=8, packing=False)):
        rows = store.rows(cut)
        with pytest.raises(IndexError):
            rows[len(rows)]
        assert np.array_equal(rows[-1]["tokens"], rows[len(rows) - 1]["tokens"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 3, "overlap": 3}, "3 of them are spent on overlap"),
        ({"length": 3, "split": False, "before": (1, 2), "after": (3,)}, "3 of them are spent on special tokens"),
        ({"length": 3, "split": False, "overlap": 1}, "do not overlap"),
    ],
)
def test_a_cut_that_leaves_no_room_is_an_error(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Cut(**arguments)


def test_a_store_keeps_every_document_but_empty_ones():
    tokenizer = ByteTokenizer()
    documents = ["héllo", "", "b", "longer text"]
    store = TokenStore.build(Records("here", [{"text": document} for document in documents]), tokenizer, "text")
    parts = np.split(store.tokens, store.offsets[1:-1])
    assert [tokenizer.decode(part) for part in parts] == ["héllo", "b", "longer text"]
    assert (store.tokens.dtype, len(store)) == (np.int32, 3)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": ""}], "'here' has no tokens"),
        ([{"text": "a"}, {"text": 5}], "field 'text' of record 1 of 'here' is 5"),
    ],
)
def test_a_source_without_text_is_an_error(records, message):
    with pytest.raises(DataError, match=message):
        TokenStore.build(Records("here", records), ByteTokenizer(), "text")


def test_a_large_source_is_tokenized_in_groups(monkeypatch):
    monkeypatch.setattr("lmx.text.packing.CHARACTERS_AT_ONCE", 10)
    source = Records("here", [{"text": "x" * (i % 7)} for i in range(50)])
    store = TokenStore.build(source, ByteTokenizer(), "text")
    assert np.diff(store.offsets).tolist() == [i % 7 for i in range(50) if i % 7]


def test_long_work_shows_its_progress(monkeypatch, capsys):
    monkeypatch.setattr("lmx.text.packing.SECONDS_BEFORE_PROGRESS", -1.0)
    TokenStore.build(Records("the-source", [{"text": "x"}]), ByteTokenizer(), "text")
    captured = capsys.readouterr()
    assert "tokenizing the-source" in captured.err and captured.out == ""


def test_a_store_is_remembered_with_its_source():
    source, tokenizer = Records("here", [{"text": "a", "other": "bc"}]), ByteTokenizer()
    store = token_store(source, tokenizer, "text")
    assert token_store(source, tokenizer, "text") is store
    assert len(token_store(source, tokenizer, "other").tokens) == 2
    assert token_store(source, ByteTokenizer(), "other") is not store


def test_samples_are_windows_of_one_document_from_everywhere():
    store, documents = random_store(3)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(2000):
        window = store.sample(rng, 5)
        document = next(document for document in documents if window[0] in document)
        assert set(window) <= set(document)
        assert len(window) == min(5, len(document))
        assert np.array_equal(window, np.arange(window[0], window[0] + len(window)))
        seen |= set(window.tolist())
    assert seen == set(store.tokens.tolist())


def test_a_million_documents_become_rows():
    lengths = np.random.default_rng(0).integers(1, 9, size=1_000_000)
    store = TokenStore(np.zeros(lengths.sum(), np.int32), np.concatenate([[0], np.cumsum(lengths)]))
    for cut, whole in (
        (Cut(length=64), True),
        (Cut(length=64, split=False), False),
        (Cut(length=4, packing=False), False),
    ):
        rows = store.rows(cut)
        assert len(rows) == -(-lengths.sum() // 64) if whole else len(rows) >= lengths.sum() / cut.length
        assert len(rows[len(rows) - 1]["tokens"]) >= 1
