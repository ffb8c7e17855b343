"""Mixtures: the shares of their sources, exactly, and what is said where a source is missing, empty or short."""

from fractions import Fraction

import numpy as np
import pytest

from lmx.config import Config
from lmx.errors import ConfigError, DataError
from lmx.text.corpora import Mixture, open_source, source_names
from lmx.text.mixing import Selection, mixing_shares

from .stubs import Pairs, Rows
from .test_pipeline import batches, documents, few_at_once, take  # noqa: F401

SHARES = [(7, 3), (1, 1), (1, 999), (1, 2, 3, 5), (1, 1, 1), (3,)]


@pytest.mark.parametrize("shares", SHARES)
def test_shares_are_exact_over_a_cycle_and_close_within_it(shares):
    total = sum(shares)
    selection = Selection.of([Fraction(share, total) for share in shares])
    drawn = [selection[i] for i in range(3 * total)]
    counts = np.zeros((3 * total + 1, len(shares)))
    for number, (source, place) in enumerate(drawn):
        assert place == counts[number, source]  # each source's examples in their order, none left out
        counts[number + 1] = counts[number]
        counts[number + 1, source] += 1
    assert counts[[total, 2 * total, 3 * total]].tolist() == [[n * share for share in shares] for n in (1, 2, 3)]
    expected = np.arange(3 * total + 1)[:, None] * np.array(shares) / total
    assert np.abs(counts - expected).max() < len(shares)


def test_shares_are_exact_after_a_million_million_examples():
    selection = Selection.of((Fraction(7, 10), Fraction(3, 10)))
    begin = 10**12
    assert [selection[begin + i][0] for i in range(10)].count(0) == 7
    assert sorted(place for source, place in map(selection.__getitem__, range(begin, begin + 10)) if source == 0) == [
        7 * 10**11 + i for i in range(7)
    ]


@pytest.mark.parametrize("weights", ["0.7 0.3", "0.07 0.03", "7e2 3e2"])
def test_weights_are_read_as_they_are_written(tmp_path, weights):
    (tmp_path / "a.txt").write_text("some text")
    first, second = weights.split()
    mixture = open_source(f"{first}*text:{tmp_path}/a.txt + {second}*text:{tmp_path}/a.txt")
    assert mixture.weights == (Fraction(7, 10), Fraction(3, 10))


def mixture(*sizes, weights=()):
    return Mixture("the mixture", [documents(size, start=32 * i) for i, size in enumerate(sizes)], weights)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, [0.1, 0.2, 0.7]),
        ({"mixing_limit": 15}, [10 / 40, 15 / 40, 15 / 40]),  # Raffel et al. 2020, section 3.5.2
        ({"mixing_limit": 5}, [1 / 3, 1 / 3, 1 / 3]),
        ({"mixing_temperature": 2.0}, np.sqrt([0.1, 0.2, 0.7]) / np.sqrt([0.1, 0.2, 0.7]).sum()),
        ({"mixing_temperature": 1e9}, [1 / 3, 1 / 3, 1 / 3]),
        ({"mixing_limit": 20, "mixing_temperature": 2.0}, np.sqrt([0.2, 0.4, 0.4]) / np.sqrt([0.2, 0.4, 0.4]).sum()),
    ],
)
def test_shares_by_size(data, expected):
    settings = Config().replace(data={"mixing": "proportional"} | data).data
    shares = mixing_shares(mixture(10, 20, 70), (10, 20, 70), settings)
    assert sum(shares) == 1
    np.testing.assert_allclose([float(share) for share in shares], expected, rtol=1e-7)


def drawn(source, steps, batch_size, hosts=(0, 1), **data):
    """Which source each row of the training batches is of."""
    taken = take(batches(source, Rows(), batch_size=batch_size, hosts=hosts, **data), steps)
    for batch in taken:  # documents of source i begin with byte 32 * i
        assert ((batch["tokens"] - 5) // 32 == batch["sources"])[batch["weights"] > 0].all()
    return np.stack([batch["sources"][:, 0] for batch in taken])


def test_training_draws_the_shares_exactly():
    by_weight = drawn(mixture(10, 6, weights=(0.75, 0.25)), steps=100, batch_size=8, shuffle=False)
    assert np.bincount(by_weight.ravel()).tolist() == [600, 200]
    by_size = drawn(mixture(10, 6), steps=100, batch_size=8, mixing="proportional", shuffle=False)
    assert np.bincount(by_size.ravel()).tolist() == [500, 300]


def test_the_order_is_the_same_on_any_number_of_hosts():
    source = mixture(10, 6, 3)
    alone = drawn(source, steps=6, batch_size=8, mixing="proportional")
    halves = [drawn(source, steps=6, batch_size=4, hosts=(i, 2), mixing="proportional") for i in range(2)]
    assert np.array_equal(np.concatenate(halves, axis=1), alone)


@pytest.mark.parametrize(
    ("weights", "data", "message"),
    [
        ((), {}, "have no weights: write 0.7"),
        ((1, 1), {"mixing": "proportional"}, "has weights, but data.mixing is 'proportional'"),
        ((1, 1), {"max_epochs": 50}, r"'documents' is too short: .* its 2 examples more than .* \(50\)"),
    ],
)
def test_a_mixture_that_cannot_be_drawn_as_asked_is_an_error(weights, data, message):
    with pytest.raises(DataError, match=message):
        drawn(mixture(50, 2, weights=weights), steps=5, batch_size=4, **data)


@pytest.mark.parametrize("missing", ["text:none.txt", "text:empty.txt", "text:empty-[0-9].txt"])
def test_a_missing_or_empty_source_is_an_error(tmp_path, monkeypatch, missing):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "empty.txt").write_text("")
    for spec in (f"0.9*text:a.txt + 0.1*{missing}", f"{missing} + text:a.txt"):
        with pytest.raises(DataError, match="empty|no file"):
            open_source(spec)


def test_epochs_are_counted_where_examples_share_rows():
    source = open_source("builtin:copy[:20]", ("source", "target"))
    iterator = batches(source, Pairs(), batch_size=2, max_epochs=2)
    with pytest.raises(DataError, match=r"its 20 examples more than data.max_epochs \(2\)"):
        seen = [batch["encoder_segments"].max(axis=1).sum() for batch in iterator]
        assert sum(seen) == 0  # not reached: the stream ends with the error


def test_limits_and_temperatures_without_their_mixing_are_an_error():
    for field, value in (("mixing_limit", 5), ("mixing_temperature", 2.0)):
        with pytest.raises(ConfigError, match="set data.mixing='proportional'"):
            Config().replace(data={field: value})


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("tfds:glue/sst2[:90%]", ("glue_sst2",)),
        ("0.5*text:/data/books/a.txt + 0.5*jsonl:~/b.jsonl.gz", ("a", "b")),
        ("text:a/x.txt + text:b/x.txt + text:b/*.txt", ("x_1", "x_2", "text")),
        ("task:my/t.jsonl#shout@test + hf:org/name/config@train", ("shout@test", "org_name_config@train")),
    ],
)
def test_sources_have_short_names_for_their_metrics(spec, names):
    assert source_names(spec) == names
