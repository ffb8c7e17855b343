"""Batches: a function of (seed, index) on any number of hosts and workers, and every row exactly once."""

import itertools
import json

import numpy as np
import pytest

from lmx.config import Config
from lmx.errors import DataError
from lmx.text.corpora import Mixture, Records, open_source
from lmx.text.packing import Cut, TokenStore
from lmx.text.pipeline import make_batches
from lmx.text.tokenizers import ByteTokenizer
from tests.text.stubs import Labels, Pairs, Rows


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch):
    """Several lists of examples to pack in a short stream, and less time spent on Grain's order of very few records."""
    monkeypatch.setattr("lmx.text.pipeline.EXAMPLES_AT_ONCE", 24)


FIRST = 5  # the id of byte 0
TOKENIZER = ByteTokenizer()


def documents(count: int, start: int = 0) -> Records:
    """Documents of 8 equal bytes each, another byte in every document: with rows of 8, row i is document i."""
    return Records("documents", [{"text": chr(start + i) * 8} for i in range(count)])


def batches(source, objective, *, train=True, seed=0, batch_size=4, hosts=(0, 1), **data):
    config = Config().replace(data=data)
    index, count = hosts
    return make_batches(
        source,
        TOKENIZER,
        objective,
        config,
        train=train,
        seed=seed,
        batch_size=batch_size,
        process_index=index,
        process_count=count,
    )


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    taken = list(itertools.islice(iterator, count))
    assert len(taken) == count
    return taken


def assert_same(left, right) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def row_ids(taken) -> list[int]:
    """Which document each row is."""
    return [int(token) - FIRST for batch in taken for token in batch["tokens"][:, 0]]


PAIRS = ("source", "target")
STREAMS = {
    "rows": lambda **options: batches(documents(10), Rows(), **options),
    "mixture": lambda **options: batches(
        Mixture("both", [documents(10), documents(6, start=50)], [3.0, 1.0]), Rows(), **options
    ),
    "by size": lambda **options: batches(
        Mixture("both", [documents(10), documents(6, start=50)]), Rows(), mixing="proportional", **options
    ),
    "packed mixture": lambda **options: batches(
        Mixture("both", [open_source(f"builtin:{name}[:40]", PAIRS) for name in ("copy", "reverse")], [3, 1]),
        Pairs(),
        **options,
    ),
    "packed": lambda **options: batches(open_source("builtin:copy[:40]", PAIRS), Pairs(), **options),
    "unpacked": lambda **options: batches(open_source("builtin:copy[:40]", PAIRS), Pairs(), packing=False, **options),
}


def test_the_arrays_of_a_batch():
    (batch,) = take(batches(documents(10), Rows(), train=False, batch_size=10), 1)
    assert {name: (str(array.dtype), array.shape) for name, array in batch.items()} == {
        "tokens": ("int32", (10, 8)),
        "segments": ("int32", (10, 8)),
        "positions": ("int32", (10, 8)),
        "weights": ("float32", (10, 8)),
        "draw": ("float32", (10,)),
        "sample": ("int32", (10,)),
    }
    assert row_ids([batch]) == list(range(10))


@pytest.mark.parametrize("name", STREAMS)
def test_the_same_seed_gives_the_same_batches_and_another_gives_others(name):
    first, again, other = (take(STREAMS[name](seed=seed), 5) for seed in (0, 0, 1))
    assert_same(first, again)
    tokens = "tokens" if "tokens" in first[0] else "encoder_tokens"
    assert any(not np.array_equal(a[tokens], b[tokens]) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("done", [0, 1, 7])
def test_a_resumed_stream_goes_on_exactly(name, done):
    unbroken = STREAMS[name]()
    take(unbroken, done)
    state = json.loads(json.dumps(unbroken.get_state()))
    expected = take(unbroken, 6)
    resumed = STREAMS[name]()
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_same(take(resumed, 6), expected)
    take(resumed, 3)
    resumed.set_state(state)  # and back again, on the same iterator
    assert_same(take(resumed, 6), expected)


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("train", [True, False])
def test_hosts_together_have_the_global_batch(name, train):
    whole = list(itertools.islice(STREAMS[name](train=train, batch_size=4), 8))
    hosts = [
        list(itertools.islice(STREAMS[name](train=train, batch_size=2, hosts=(index, 2)), 8)) for index in range(2)
    ]
    joined = [
        {array: np.concatenate([a[array], b[array]]) for array in a} for a, b in zip(hosts[0], hosts[1], strict=True)
    ]
    assert_same(joined, whole)


def test_a_checkpoint_goes_on_with_other_hosts():
    expected = take(STREAMS["packed"](batch_size=4), 8)
    first = STREAMS["packed"](batch_size=2, hosts=(0, 2))
    take(first, 3)
    resumed = STREAMS["packed"](batch_size=4)
    resumed.set_state(first.get_state())
    assert_same(take(resumed, 5), expected[3:])


def test_an_epoch_is_every_row_once_in_a_fresh_order():
    ids = row_ids(take(batches(documents(10), Rows(), batch_size=5), 8))
    epochs = [ids[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert row_ids(take(batches(documents(10), Rows(), batch_size=5, shuffle=False), 4)) == [*range(10), *range(10)]


def test_consecutive_seeds_do_not_share_their_orders():
    orders = [row_ids(take(batches(documents(50), Rows(), seed=seed, batch_size=50), 3)) for seed in (0, 1)]
    epochs = {tuple(order[start : start + 50]) for order in orders for start in (0, 50, 100)}
    assert len(epochs) == 6


def test_fewer_rows_than_a_batch_still_train():
    assert sorted(row_ids(take(batches(documents(3), Rows(), batch_size=6), 1))) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("dynamic", [True, False])
def test_draws_are_fresh_each_epoch_only_if_dynamic(dynamic):
    taken = take(batches(documents(10), Rows(dynamic=dynamic), batch_size=10), 2)
    draws = [dict(zip(row_ids([batch]), batch["draw"].tolist(), strict=True)) for batch in taken]
    assert len(set(draws[0].values())) == 10
    assert [draws[0][i] == draws[1][i] for i in range(10)] == [not dynamic] * 10


def test_a_draw_depends_on_the_row_and_not_on_its_place():
    shuffled = take(batches(documents(10), Rows(dynamic=False), batch_size=10), 1)[0]
    in_order = take(batches(documents(10), Rows(dynamic=False), train=False, batch_size=10), 1)[0]
    draws = dict(zip(row_ids([shuffled]), shuffled["draw"].tolist(), strict=True))
    assert [draws[i] for i in range(10)] == in_order["draw"].tolist()


def test_evaluation_is_every_row_once_in_order_then_zeros():
    taken = list(batches(documents(10), Rows(), train=False, batch_size=4))
    assert [batch["weights"].sum(axis=1).tolist() for batch in taken] == [[8] * 4, [8] * 4, [8, 8, 0, 0]]
    assert row_ids(taken)[:10] == list(range(10))
    for array in taken[-1].values():
        assert not array[2:].any()


@pytest.mark.parametrize("name", ["rows", "packed"])
def test_every_host_has_as_many_evaluation_batches(name):
    counts = [len(list(STREAMS[name](train=False, batch_size=2, hosts=(index, 8)))) for index in range(8)]
    assert len(set(counts)) == 1 and counts[0] >= 1


def test_a_mixture_trains_by_weight_and_evaluates_in_order():
    mixture = Mixture("both", [documents(10), documents(6, start=50)], [3.0, 1.0])
    ids = row_ids(take(batches(mixture, Rows(), batch_size=40), 3))
    assert sum(i < 50 for i in ids) == 90
    assert {i for i in ids} == {*range(10), *range(50, 56)}
    evaluated = list(batches(mixture, Rows(), train=False, batch_size=4))
    assert row_ids(evaluated) == [*range(10), *range(50, 56)]
    assert len({draw for batch in evaluated for draw in batch["draw"].tolist()}) == 16


def test_samples_come_from_the_rows_own_source():
    mixture = Mixture("both", [documents(10), documents(6, start=50)], [1.0, 1.0])
    for batch in take(batches(mixture, Rows(), batch_size=8), 5):
        rows, samples = batch["tokens"][:, 0] - FIRST, batch["sample"] - FIRST
        assert ((rows < 50) == (samples < 50)).all()


def test_packed_examples_are_all_there_and_apart():
    source = open_source("builtin:reverse[:40]", PAIRS)
    found = []
    taken = list(batches(source, Pairs(), train=False))
    for batch in taken:
        for row in range(4):
            for segment in range(1, batch["encoder_segments"][row].max() + 1):
                pair = []
                for prefix in ("encoder", "decoder"):
                    here = batch[f"{prefix}_segments"][row] == segment
                    pair.append(TOKENIZER.decode(batch[f"{prefix}_tokens"][row][here]))
                    assert batch[f"{prefix}_positions"][row][here].tolist() == list(range(here.sum()))
                assert batch["decoder_weights"][row][here].all()
                found.append(tuple(pair))
        empty = batch["encoder_segments"] == 0
        assert not batch["encoder_tokens"][empty].any() and not batch["encoder_positions"][empty].any()
    assert sorted(found) == sorted((source[i]["source"], source[i]["target"]) for i in range(40))
    assert max(batch["encoder_segments"].max() for batch in taken) >= 2
    assert len(taken) < 10  # which is what one example a row would take


def test_packing_finds_the_row_that_an_example_fits_best():
    source = Records("pairs", [{"source": "x" * size, "target": "x" * size} for size in (3, 6, 4, 1, 7, 2)])
    taken = list(batches(source, Pairs(length=10), train=False, batch_size=3))
    rows = [np.bincount(row)[1:].tolist() for batch in taken for row in batch["encoder_segments"]]
    assert rows == [[3, 7], [6, 4], [1, 2]]  # in their order, the first that fits takes one row more


def test_without_packing_an_example_has_its_row():
    (batch,) = batches(open_source("builtin:copy[:40]", PAIRS), Pairs(), train=False, batch_size=40, packing=False)
    assert batch["encoder_segments"].max() == 1
    assert [TOKENIZER.decode(row[row > 0]) for row in batch["encoder_tokens"]] == [
        open_source("builtin:copy", PAIRS)[i]["source"] for i in range(40)
    ]


def test_scalars_and_types():
    source = Records("labelled", [{"text": "ab", "label": 1}, {"text": "c", "label": 2}, {"text": "defg", "label": 0}])
    first, last = batches(source, Labels(), train=False, batch_size=2)
    assert first["tokens"].tolist() == [[FIRST + 97, FIRST + 98, 0, 0], [FIRST + 99, 0, 0, 0]]
    assert {name: str(array.dtype) for name, array in first.items()} == {
        "tokens": "int32",
        "labels": "int32",
        "label_weights": "float32",
    }
    assert (first["labels"].tolist(), last["labels"].tolist()) == ([1, 2], [0, 0])
    assert last["label_weights"].tolist() == [1, 0]


def test_an_error_in_a_record_reaches_the_reader():
    class Refusing(Labels):
        def view(self, record, rng, sample):
            if record["label"] == 3:
                raise DataError("record three is refused")
            return super().view(record, rng, sample)

    source = Records("labelled", [{"text": "a", "label": i} for i in range(6)])
    iterator = batches(source, Refusing(), train=False, batch_size=1)
    take(iterator, 3)
    with pytest.raises(DataError, match="record three is refused"):
        next(iterator)


@pytest.mark.parametrize("name", ["rows", "packed"])
def test_worker_processes_change_nothing(name):
    alone, helped = STREAMS[name](), STREAMS[name](num_workers=2)
    expected = take(alone, 8)
    assert_same(take(helped, 4), expected[:4])
    resumed = STREAMS[name]()
    resumed.set_state(helped.get_state())  # and a run may go on without them
    assert_same(take(resumed, 4), expected[4:])
    helped.close()


def test_a_source_is_tokenized_once(monkeypatch):
    built = []
    build = TokenStore.build.__func__
    monkeypatch.setattr(TokenStore, "build", classmethod(lambda cls, *args: built.append(1) or build(cls, *args)))
    source = documents(10)
    for _ in range(3):
        take(batches(source, Rows(), train=False, batch_size=4), 3)
    batches(source, Rows(cut=Cut(length=4)))
    assert len(built) == 1
