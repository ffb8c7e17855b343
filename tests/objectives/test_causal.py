import jax
import numpy as np
import pytest

from lmx.errors import ConfigError
from lmx.objectives import make_objective

from .stubs import BOS, EOS, Letters, Oracle, batch, config, corpus, init, no_sample, rng, row


def view(objective, *documents):
    return objective.view(row(*documents), rng(), no_sample)


def test_targets_are_the_next_tokens_and_eos_behind_each_document():
    objective = make_objective(config("causal", data={"length": 8}), Letters())
    example = view(objective, [BOS, 10, 11, 12], [BOS, 20], [BOS, 30, 31])
    assert example["tokens"].tolist() == [BOS, 10, 11, 12, BOS, 20, BOS, 30]
    assert example["targets"].tolist() == [10, 11, 12, EOS, 20, EOS, 30, 31]
    assert example["weights"].tolist() == [1] * 8
    assert example["segments"].tolist() == [1, 1, 1, 1, 2, 2, 3, 3]
    assert example["positions"].tolist() == [0, 1, 2, 3, 0, 1, 0, 1]


def test_a_row_that_ends_the_corpus_ends_in_eos():
    objective = make_objective(config("causal", data={"length": 8}), Letters())
    example = view(objective, [BOS, 10, 11])
    assert example["tokens"].tolist() == [BOS, 10, 11]
    assert example["targets"].tolist() == [10, 11, EOS]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_every_token_and_one_eos_a_document_is_a_target_exactly_once(seed, packing):
    objective = make_objective(config("causal", data={"length": 8, "packing": packing}), Letters())
    sizes = rng(seed).integers(1, 20, size=4)  # some documents and corpora end exactly where a row does
    documents = np.split(np.arange(100, 100 + sizes.sum()), np.cumsum(sizes)[:-1])
    examples = [objective.view(r, rng(), no_sample) for r in corpus(*documents).rows(objective.cut)]
    targets = np.concatenate([example["targets"] for example in examples])
    assert targets.tolist() == [token for document in documents for token in (*document, EOS)]
    assert all(len(example["tokens"]) == len(example["targets"]) <= 8 for example in examples)
    if not packing:
        assert all(example["segments"].max() == 1 for example in examples)


def test_one_token_for_both_ends_stands_once_between_documents():
    tokenizer = Letters(bos_id=None)
    objective = make_objective(config("causal", data={"length": 8}), tokenizer)
    assert objective.cut.before == (EOS,)
    example = view(objective, [EOS, 10, 11], [EOS, 20])
    assert example["tokens"].tolist() == [EOS, 10, 11, EOS, 20]
    assert example["targets"].tolist() == [10, 11, EOS, 20, EOS]


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(ConfigError, match="eos token"):
        make_objective(config("causal"), Letters(eos_id=None))


def test_terms_by_hand_and_smoothing_in_training_only():
    sections = {"data": {"length": 4}, "objective": {"label_smoothing": 0.2, "z_loss": 0.1}}
    objective = make_objective(config("causal", **sections), Letters())
    examples = batch(objective, view(objective, [BOS, 10, 11]), view(objective, [BOS]))
    logits = np.zeros((2, 4, 32), np.float32)
    logits[0, 0, 10] = logits[0, 1, 9] = np.log(33)  # one right, one wrong; the rest even
    right, wrong, even = np.log(64 / 33), np.log(64), np.log(32)

    terms = objective.terms(Oracle(logits), examples)
    np.testing.assert_allclose(terms["loss"], (right + wrong + 2 * even, 4), rtol=1e-6)
    np.testing.assert_allclose(terms["accuracy"], (1, 4))
    np.testing.assert_allclose(objective.weights(examples)["loss"], 4)

    def smoothed(target_logit, log_z, mean):
        return log_z - 0.8 * target_logit - 0.2 * mean + 0.1 * log_z**2

    peak = np.log(33) / 32
    expected = smoothed(np.log(33), np.log(64), peak) + smoothed(0, np.log(64), peak) + 2 * smoothed(0, even, 0)
    np.testing.assert_allclose(objective.terms(Oracle(logits), examples, True)["loss"], (expected, 4), rtol=1e-6)


def test_the_transformer_scores_packed_documents_as_it_scores_them_alone():
    tokenizer = Letters()
    setting = config("causal")
    objective = make_objective(setting, tokenizer)
    documents = [[BOS, 10, 11, 12, 13], [BOS, 20, 21], [BOS, 9, 8, 7]]
    packed = batch(objective, view(objective, *documents))
    alone = batch(objective, *[view(objective, document) for document in documents])
    model, variables = init(setting, tokenizer, packed)

    @jax.jit
    def terms(examples):
        return model.apply(variables, examples, method=objective.terms)

    together, apart = terms(packed), terms(alone)
    np.testing.assert_allclose(together["loss"], apart["loss"], rtol=1e-5)
    assert together["loss"][1] == 12
    assert together["accuracy"] == apart["accuracy"]


def test_rows_longer_than_the_learned_positions_are_refused():
    sections = {"model": {"max_length": 20}}
    with pytest.raises(ConfigError, match="rows of 30 tokens, but model.max_length is 20"):
        make_objective(config("seq2seq", **sections, data={"length": 16, "target_length": 30}), Letters())
