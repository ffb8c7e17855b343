"""Best fit: every example once and whole, in rows that are as full as may be."""

import numpy as np
import pytest

from lmx.text.best_fit import BestFit, fit


@pytest.mark.parametrize("seed", range(5))
def test_every_example_has_one_place_and_no_row_is_too_long(seed):
    rng = np.random.default_rng(seed)
    room = np.array([50, 20])
    sizes = rng.integers(1, room + 1, size=(200, 2))
    rows = fit(sizes, room)
    assert sorted(index for row in rows for index in row) == list(range(200))
    assert all(row == sorted(row) for row in rows) and rows == sorted(rows)
    totals = np.array([sizes[row].sum(axis=0) for row in rows])
    assert (totals <= room).all()
    # No two rows would fit into one: best fit would have put the smaller's last example into the other.
    for i in range(len(rows)):
        assert not ((totals[i] + totals[i + 1 :]) <= room).all(axis=1).any()


def test_rows_are_filled_where_they_can_be():
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, 100), size=(40, 3)), axis=1)  # forty rows of 100, each in up to four pieces
    sizes = np.diff(cuts, prepend=0, append=100).ravel()
    sizes = rng.permutation(sizes[sizes > 0])[:, None]
    assert len(fit(sizes, np.array([100]))) <= 41  # forty is the best that there can be


def test_an_example_goes_where_it_leaves_least_room():
    sizes = np.array([[3], [6], [4], [1], [7], [2]])
    assert fit(sizes, np.array([10])) == [[0, 4], [1, 2], [3, 5]]


def test_a_row_numbers_its_examples_in_every_array_alike():
    examples = [
        {"encoder_tokens": np.arange(n), "decoder_tokens": np.arange(m), "decoder_weights": np.full(m, 0.5)}
        for n, m in ((3, 1), (2, 2))
    ]
    lengths = {"encoder_tokens": 8, "encoder_segments": 8, "decoder_tokens": 4, "decoder_weights": 4}
    (row,) = BestFit(lengths)(examples)
    assert {name: values.tolist() for name, values in row.items()} == {
        "encoder_tokens": [0, 1, 2, 0, 1],
        "encoder_segments": [1, 1, 1, 2, 2],
        "encoder_positions": [0, 1, 2, 0, 1],
        "decoder_tokens": [0, 0, 1],
        "decoder_segments": [1, 2, 2],
        "decoder_positions": [0, 0, 1],
        "decoder_weights": [0.5, 0.5, 0.5],
    }
