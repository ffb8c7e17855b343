"""Random batches are filled as they say, and the same documents lie in padded and packed ones."""

import numpy as np
import pytest

from lmx.benchmarking.batches import random_batch
from lmx.benchmarking.cases import Size, bert, gpt2, t5

SIZE = Size(2, 64, 6, 32)
SHAPE = (6, 32)
NAMES = ("tokens", "targets", "weights", "segments", "positions")


def batch_of(config, documents):
    return random_batch(config, dict.fromkeys(NAMES, SHAPE), documents)


def test_whole_rows_hold_one_document_and_no_padding():
    batch = batch_of(gpt2(SIZE), "whole")
    assert (batch["segments"] == 1).all() and (batch["weights"] == 1).all()
    np.testing.assert_array_equal(batch["positions"], np.tile(np.arange(32), (6, 1)))
    assert batch["tokens"].min() >= 10 and batch["tokens"].max() > 40_000  # of the whole vocabulary


def test_padded_rows_hold_one_document_of_a_quarter_row_or_more():
    segments = batch_of(bert(SIZE), "padded")["segments"]
    lengths = (segments == 1).sum(1)
    assert segments.max() == 1 and lengths.min() >= 8 and len(set(lengths)) > 2 and lengths.min() < 32
    assert all((row[:length] == 1).all() for row, length in zip(segments, lengths, strict=True))


def test_packed_rows_are_full_of_documents_whose_positions_restart():
    batch = batch_of(bert(SIZE), "packed")
    assert (batch["segments"] > 0).all() and batch["segments"].max() > 1
    starts = np.diff(batch["segments"], axis=1, prepend=0) != 0
    np.testing.assert_array_equal(batch["positions"] == 0, starts)


@pytest.mark.parametrize("documents", ["whole", "padded", "packed"])
def test_masked_models_predict_fifteen_percent_of_each_row_and_no_padding(documents):
    batch = batch_of(bert(SIZE), documents)
    real = batch["segments"] > 0
    np.testing.assert_array_equal(batch["weights"].sum(1), np.round(0.15 * real.sum(1)))
    assert not batch["weights"][~real].any()


def test_both_stacks_are_filled():
    names = [f"{stack}_{name}" for stack in ("encoder", "decoder") for name in ("tokens", "segments", "positions")]
    batch = random_batch(t5(SIZE), dict.fromkeys([*names, "decoder_targets", "decoder_weights"], SHAPE), "whole")
    assert (batch["decoder_segments"] == 1).all() and (batch["decoder_weights"] == 1).all()
    assert (batch["encoder_tokens"] != batch["decoder_tokens"]).any()
