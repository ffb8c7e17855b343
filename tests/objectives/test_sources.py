"""The loss of each source of a training mixture, in the batch that holds them all; and packed rows against others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.objectives import OBJECTIVES, make_objective
from lmx.text.corpora import Mixture, Records, source_names
from lmx.text.pipeline import make_batches

from .stubs import Letters, Oracle, config, init

SPEC = "0.5*jsonl:first.jsonl + 0.3*jsonl:second.jsonl + 0.2*jsonl:third.jsonl"
SENTINELS = 8


class Tokenizer(Letters):
    """Letters, and several texts at once."""

    def encode_batch(self, texts):
        return [np.array(self.encode(text), np.int32) for text in texts]


def records(number, count=6):
    """Records for every objective, whose texts differ between sources and in length."""
    letters = "abcdefghijklmnopqrstuvwxyz"[number:]
    texts = [(letters[i:] * 3)[: 3 + (5 * i + number) % 9] for i in range(count)]
    return Records(
        f"source {number}", [{"text": t, "source": t, "target": t[::-1], "label": len(t) % 2} for t in texts]
    )


def experiment(name, source, training, spec=SPEC, **data):
    setting = config(name, data={"train": spec, "length": 16, "target_length": 16} | data)
    tokenizer = Tokenizer(sentinels=SENTINELS)
    objective = make_objective(setting, tokenizer)
    settings = {"train": training, "seed": 0, "batch_size": 8}
    return setting, tokenizer, objective, make_batches(source, tokenizer, objective, setting, **settings)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_of_a_source_is_the_loss_of_its_tokens_alone(name):
    mixture = Mixture(SPEC, [records(number) for number in range(3)], [0.5, 0.3, 0.2])
    _, tokenizer, objective, batches = experiment(name, mixture, training=True)
    batch, rng = jax.tree.map(jnp.asarray, next(batches)), np.random.default_rng(0)
    logits, classes = rng.normal(size=(8, 16, tokenizer.vocab_size)), rng.normal(size=(8, 2))
    decoder = objective.lengths.get("decoder_tokens", 16)
    model = Oracle(logits[:, :decoder], classes)
    whole = objective.terms(model, batch, train=True)
    assert {term for term in whole if "/" in term} == {"loss/first", "loss/second", "loss/third"}
    weights = getattr(objective, "weights_name", "label_weights")
    sources = weights.replace("weights", "sources")
    assert set(np.unique(batch[sources][batch[weights] > 0])) == {0, 1, 2}
    for number, source in enumerate(source_names(SPEC)):
        only = {weights: jnp.where(batch[sources] == number, batch[weights], 0)}
        alone = objective.terms(model, batch | only, train=True)
        np.testing.assert_allclose(whole[f"loss/{source}"], alone["loss"], rtol=1e-5)
    total = np.sum([whole[f"loss/{source}"] for source in source_names(SPEC)], axis=0)
    np.testing.assert_allclose(total, whole["loss"], rtol=1e-5)


@pytest.mark.parametrize("name", ["causal", "seq2seq", "classification"])
def test_one_source_and_evaluation_know_of_no_sources(name):
    for training, source in ((True, records(0)), (False, Mixture(SPEC, [records(0), records(1)], [1, 1]))):
        *_, objective, batches = experiment(name, source, training, spec="jsonl:first.jsonl")
        assert objective.sources == ()
        assert not [array for array in next(batches) if array.endswith("sources")]


@pytest.mark.slow
def test_packed_pairs_have_the_loss_of_unpacked_ones():
    source, sums, rows = records(0, count=20), {}, {}
    for packing in (True, False):
        setting, tokenizer, objective, batches = experiment("seq2seq", source, training=False, packing=packing)
        batches = list(batches)
        model, variables = init(setting, tokenizer, batches[0])
        terms = jax.jit(functools.partial(model.apply, variables, method=objective.terms))
        found = [jax.device_get(terms(batch)) for batch in batches]
        sums[packing] = {name: np.sum([part[name] for part in found], axis=0) for name in found[0]}
        rows[packing] = sum(int((batch["encoder_segments"] > 0).any(axis=1).sum()) for batch in batches)
    assert sums[True].keys() == sums[False].keys() == {"loss", "accuracy", "exact_match"}
    for name, value in sums[True].items():
        np.testing.assert_allclose(value, sums[False][name], rtol=1e-5)
    assert rows[False] == 20 and rows[True] <= 14
