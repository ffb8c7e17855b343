"""The unigram baseline against counting by hand."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from lmx.config import Config, Data, Model, Tokenizer, Train
from lmx.errors import LmxError
from lmx.evaluation.unigram import unigram_loss


class Batches:
    """Stands in for an experiment: given targets, by source."""

    def __init__(self, batches, vocab_size=5):
        self.batches = batches
        self.objective = SimpleNamespace(lengths={"targets": 3, "weights": 3})
        data = Data(train="builtin:copy", eval="builtin:reverse")
        self.config = Config(model=Model(vocab_size=vocab_size), data=data, train=Train(), tokenizer=Tokenizer())

    def eval_batches(self, source=None):
        for targets, weights in self.batches[source or self.config.data.eval]:
            yield {"targets": np.array(targets), "weights": np.array(weights, np.float32), "tokens": np.array(targets)}


def test_the_loss_is_that_of_counted_frequencies():
    train = [([[1, 1, 2]], [[1, 1, 1]]), ([[3, 1, 0]], [[1, 1, 0]])]
    held_out = [([[1, 4, 2]], [[1, 1, 0]])]
    found = unigram_loss(Batches({"builtin:copy": train, "builtin:reverse": held_out}))
    counts = Counter([1, 1, 2, 3, 1])
    probability = {token: (counts[token] + 1) / (5 + 5) for token in range(5)}
    expected = -(math.log(probability[1]) + math.log(probability[4])) / 2
    assert found == {"eval/unigram_loss": pytest.approx(expected)}


def test_classifiers_have_no_such_baseline():
    experiment = Batches({})
    experiment.objective.lengths = {"tokens": 3}
    with pytest.raises(LmxError, match="unigram"):
        unigram_loss(experiment)
