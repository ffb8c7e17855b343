"""Records that are too long for a row: an error, left out, split or cut, by setting and never without a word."""

import numpy as np
import pytest

from lmx.config import Config
from lmx.errors import ConfigError, DataError
from lmx.objectives import make_objective
from lmx.text.corpora import Mixture, Records
from lmx.text.lengths import fitted_records
from lmx.text.pipeline import make_batches
from lmx.text.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()
LENGTHS = (3, 25, 8, 9, 16, 17)  # of the texts; with [CLS] and [SEP] a row of 10 has room for 8


def classifier(too_long, **data):
    settings = {"length": 10, "too_long": too_long, "labels": tuple("abcdef")} | data
    config = Config().replace(
        model={"architecture": "encoder", "heads": ("classification",), "num_classes": 6},
        objective={"name": "classification"},
        data=settings,
    )
    return config, make_objective(config, TOKENIZER)


def translator(too_long):
    config = Config().replace(
        model={"architecture": "encoder_decoder"},
        objective={"name": "seq2seq"},
        data={"length": 9, "target_length": 5, "too_long": too_long, "packing": False},
    )
    return config, make_objective(config, TOKENIZER)


def labelled():
    texts = ("".join(chr(97 + i % 26) for i in range(length)) for length in LENGTHS)
    return Records("labelled", [{"text": text, "label": label} for text, label in zip(texts, "abcdef", strict=True)])


def rows(source, config, objective):
    """The text and the label of every row."""
    settings = {"train": False, "seed": 0, "batch_size": 4}
    found = []
    for batch in make_batches(source, TOKENIZER, objective, config, **settings):
        for tokens, label, weight in zip(batch["tokens"], batch["labels"], batch["label_weights"], strict=True):
            if weight:
                found.append((TOKENIZER.decode(tokens[tokens > 0]), "abcdef"[label]))
    return found


TEXTS = [record["text"] for record in labelled()]


@pytest.mark.parametrize(
    ("too_long", "expected", "note"),
    [
        ("drop", [(TEXTS[0], "a"), (TEXTS[2], "c")], "4 of 6 records of labelled are too long and left out"),
        (
            "cut",
            [(text[:8], label) for text, label in zip(TEXTS, "abcdef", strict=True)],
            "4 of 6 records of labelled are too long and cut",
        ),
        (
            "split",
            [
                (text[start : start + 8], label)
                for text, label in zip(TEXTS, "abcdef", strict=True)
                for start in range(0, len(text), 8)
            ],
            "4 of 6 records of labelled are too long and split into 11 examples",
        ),
    ],
)
def test_long_texts_of_a_classifier(too_long, expected, note):
    source, (config, objective) = labelled(), classifier(too_long)
    assert rows(source, config, objective) == expected
    assert fitted_records(source, objective, too_long).note == note


def test_by_default_a_long_text_is_an_error():
    config, objective = classifier("error")
    with pytest.raises(
        DataError, match=r"starts 'abcdefghijklmnopqrstuvwxy' has 25 tokens, more than the 8 .*too_long"
    ):
        rows(labelled(), config, objective)
    assert len(objective.inputs({"text": TEXTS[1]})["tokens"]) == 10  # a prediction cuts


def test_what_fits_is_not_spoken_of():
    source = Records("short", [{"text": "abc", "label": "a"}, {"text": "", "label": "b"}])
    config, objective = classifier("split")
    assert rows(source, config, objective) == [("abc", "a"), ("", "b")]
    assert fitted_records(source, objective, "split").note == ""


def pairs():
    return Records("pairs", [{"source": "s" * n, "target": "t" * m} for n, m in ((8, 4), (9, 1), (2, 5), (20, 20))])


@pytest.mark.parametrize(
    ("too_long", "expected", "number"),
    [
        ("drop", [("s" * 8, "tttt")], 3),
        ("cut", [("s" * 8, "tttt"), ("s" * 8, "t"), ("ss", "tttt"), ("s" * 8, "tttt")], 3),
    ],
)
def test_long_pairs(too_long, expected, number):
    source, (config, objective) = pairs(), translator(too_long)
    (batch,) = make_batches(source, TOKENIZER, objective, config, train=False, seed=0, batch_size=4)
    found = []
    for encoder, targets in zip(batch["encoder_tokens"], batch["decoder_targets"], strict=True):
        if encoder.any():
            found.append(tuple(TOKENIZER.decode(tokens[tokens > 0]) for tokens in (encoder, targets)))
            for tokens in (encoder[encoder > 0], targets[targets > 0]):
                assert tokens[-1] == TOKENIZER.eos_id and (tokens[:-1] != TOKENIZER.eos_id).all()
    assert found == expected
    assert fitted_records(source, objective, too_long).note.startswith(f"{number} of 4 records of pairs")


def test_a_long_pair_is_an_error_by_default():
    config, objective = translator("error")
    batches = make_batches(pairs(), TOKENIZER, objective, config, train=False, seed=0, batch_size=1)
    next(batches)
    with pytest.raises(DataError, match=r"10 tokens with its eos, more than data.length \(9\).*'drop' or 'cut'"):
        next(batches)


def test_every_source_of_a_mixture_is_measured_and_none_may_vanish():
    short = Records("short", [{"text": "ab", "label": "a"}])
    config, objective = classifier("drop")
    assert len(rows(Mixture("both", [labelled(), short]), config, objective)) == 3
    long = Records("long", [{"text": "x" * 30, "label": "a"}])
    with pytest.raises(DataError, match="every record of the source 'long' is too long"):
        rows(Mixture("both", [short, long]), config, objective)


def test_records_are_measured_once(monkeypatch):
    source, objective = labelled(), classifier("drop")[1]
    measured = []
    monkeypatch.setattr(objective, "rows", lambda record: measured.append(1) or 1)
    for _ in range(3):
        fitted_records(source, objective, "drop")
    assert len(measured) == len(LENGTHS)


def test_what_cannot_be_split_is_refused_when_the_config_is_read():
    with pytest.raises(ConfigError, match="cannot split a target"):
        translator("split")
    with pytest.raises(ConfigError, match="is for single texts"):
        classifier("split", pair_field="second")


def test_split_training_covers_every_piece_in_every_epoch():
    source, (config, objective) = labelled(), classifier("split")
    batches = make_batches(source, TOKENIZER, objective, config, train=True, seed=0, batch_size=13)
    for _ in range(3):
        batch = next(batches)
        assert np.bincount(batch["labels"]).tolist() == [1, 4, 1, 2, 2, 3]
