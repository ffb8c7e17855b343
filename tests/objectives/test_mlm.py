import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.errors import ConfigError
from lmx.objectives import make_objective
from lmx.objectives.mlm import gather_predictions

from .stubs import BOS, EOS, MASK, Letters, Oracle, batch, config, corpus, init, no_sample, rng, row

TOKENIZER = Letters()
TEXT = TOKENIZER.encode("the quick brown fox jumps over the lazy dog")


def document(text):
    return [BOS, *TOKENIZER.encode(text), EOS]


def objective_for(length=64, tokenizer=TOKENIZER, **options):
    return make_objective(config("mlm", data={"length": length}, objective=options), tokenizer)


@pytest.mark.parametrize(("letters", "expected"), [(1, 1), (10, 2), (20, 3), (43, 6)])
def test_exactly_the_rate_of_ordinary_tokens_is_chosen(letters, expected):
    objective = objective_for()
    for seed in range(20):
        example = objective.view(row([BOS, *TEXT[:letters], EOS]), rng(seed), no_sample)
        chosen = example["weights"] == 1
        assert chosen.sum() == expected <= objective.num_predictions
        assert not np.isin(example["targets"][chosen], list(TOKENIZER.special_ids)).any()
        assert (example["tokens"] == example["targets"])[~chosen].all()


def test_every_ordinary_position_is_chosen_equally_often():
    objective = objective_for()
    packed = row(document("the quick"), document("brown fox"))
    generator = rng()
    frequency = np.mean([objective.view(packed, generator, no_sample)["weights"] for _ in range(3000)], axis=0)
    ordinary = packed["tokens"] > MASK
    np.testing.assert_allclose(frequency[ordinary], 3 / 18, atol=0.03)
    assert (frequency[~ordinary] == 0).all()


def test_the_split_between_mask_random_and_kept():
    objective = objective_for()
    generator, kinds = rng(), np.zeros(3)
    for _ in range(1000):
        example = objective.view(row([BOS, *TEXT, EOS]), generator, no_sample)
        chosen = example["weights"] == 1
        tokens, original = example["tokens"][chosen], example["targets"][chosen]
        kept = tokens == original
        assert not np.isin(tokens[tokens != MASK], list(TOKENIZER.special_ids)).any()
        kinds += [(tokens == MASK).sum(), (~kept & (tokens != MASK)).sum(), kept.sum()]
    same = 1 / 27  # a random token may be the original
    np.testing.assert_allclose(kinds / kinds.sum(), [0.8, 0.1 * (1 - same), 0.1 + 0.1 * same], atol=0.015)


def test_the_textbook_rule_masks_all_that_is_chosen():
    example = objective_for(mask_split=(1, 0, 0)).view(row([BOS, *TEXT, EOS]), rng(), no_sample)
    assert (example["tokens"][example["weights"] == 1] == MASK).all()
    assert (example["tokens"] == MASK).sum() == 6


def test_the_generator_alone_decides():
    objective = objective_for()
    packed = row([BOS, *TEXT, EOS])
    first, again, other = (objective.view(packed, rng(seed), no_sample) for seed in (1, 1, 2))
    np.testing.assert_equal(first, again)
    assert (first["tokens"] != other["tokens"]).any()
    assert packed["tokens"].tolist() == [BOS, *TEXT, EOS]


def test_dynamic_masks_follow_the_config():
    assert objective_for().dynamic
    assert not objective_for(dynamic_masks=False).dynamic


def test_a_row_of_special_tokens_predicts_nothing():
    example = objective_for().view(row([BOS, EOS]), rng(), no_sample)
    assert example["weights"].sum() == 0 and example["tokens"].tolist() == [BOS, EOS]


def test_whole_words_are_masked_together_within_the_budget():
    objective = objective_for(whole_word=True, mask_rate=0.3, mask_split=(1, 0, 0))
    packed = row(document("the quick brown fox"), document("jumps over"))
    words, budget = [{1, 2, 3}, {5, 6, 7, 8, 9}, {11, 12, 13, 14, 15}, {17, 18, 19}, {22, 23, 24, 25, 26}], 9
    words += [{28, 29, 30, 31}]
    words = [word | ({max(word) + 1} if packed["tokens"][max(word) + 1] != EOS else set()) for word in words]
    seen = set()
    for seed in range(50):
        chosen = set(np.flatnonzero(objective.view(packed, rng(seed), no_sample)["weights"]).tolist())
        assert 0 < len(chosen) <= budget
        assert chosen == set().union(*(word for word in words if word & chosen))
        seen |= chosen
    assert seen == set().union(*words)


def test_a_word_longer_than_the_budget_gives_pieces():
    objective = objective_for(length=16, whole_word=True)
    assert objective.num_predictions == 2
    example = objective.view(row(document("incomprehensi")), rng(), no_sample)
    assert example["weights"].sum() == 2


def test_next_sentence_pairs():
    objective = next_sentence_objective(32)
    piece = {name: array[:20] for name, array in row(TEXT).items()}
    assert (objective.cut.length, objective.cut.packing, objective.cut.before) == (29, False, ())
    labels, splits = [], set()
    for seed in range(300):
        example = objective.view(piece, rng(seed), lambda generator, length: np.full(length, 31))
        original, types = example["targets"], example["token_types"]
        assert len(original) == 23 and original[0] == BOS and original[-1] == EOS
        size = int((types == 0).sum())
        assert original[size - 1] == EOS and types.tolist() == [0] * size + [1] * (23 - size)
        assert original[1 : size - 1].tolist() == TEXT[: size - 2]
        rest = [31] * (22 - size) if example["labels"] else TEXT[size - 2 : 20]
        assert original[size:-1].tolist() == rest
        assert example["weights"].sum() == 3 and example["label_weights"] == 1
        labels.append(example["labels"])
        splits.add(size - 2)
    assert splits == set(range(1, 20))
    assert 0.4 < np.mean(labels) < 0.6


def next_sentence_objective(length):
    model = {"heads": ("mlm", "classification"), "num_token_types": 2}
    setting = config("mlm", model=model, data={"length": length}, objective={"next_sentence": True})
    return make_objective(setting, TOKENIZER)


@pytest.mark.parametrize("next_sentence", [False, True])
def test_rows_of_a_corpus_fit_whatever_their_documents(next_sentence):
    objective = next_sentence_objective(16) if next_sentence else objective_for(16)
    store = corpus(TEXT, TEXT[:1], TEXT[5:18], TEXT[3:5])
    lengths = []
    for index, cut_row in enumerate(store.rows(objective.cut)):
        example = objective.view(cut_row, rng(index), store.sample)
        assert {name for name, value in example.items() if np.ndim(value)} == set(objective.lengths)
        assert len({len(example[name]) for name in objective.lengths}) == 1
        assert 1 <= example["weights"].sum() <= objective.num_predictions
        lengths.append(len(example["tokens"]))
    assert max(lengths) == 16


def test_a_piece_of_one_token_gets_a_random_second():
    example = next_sentence_objective(32).view(row([10]), rng(), lambda generator, length: np.full(length, 31))
    assert example["targets"].tolist() == [BOS, 10, EOS, 31, EOS] and example["labels"] == 1


def test_next_sentence_terms_by_hand():
    objective = next_sentence_objective(8)
    examples = batch(
        objective, *(objective.view(row([10, 11]), rng(seed), lambda generator, length: [31]) for seed in range(3))
    )
    examples["labels"], examples["label_weights"] = jnp.array([0, 1, 0]), jnp.array([1.0, 1.0, 0.0])
    scores = np.log(np.array([[0.75, 0.25], [0.75, 0.25], [0.5, 0.5]], np.float32))
    terms = objective.terms(Oracle(np.zeros((3, 8, 32), np.float32), scores), examples)
    np.testing.assert_allclose(terms["next_sentence"], (-np.log(0.75) - np.log(0.25), 2), rtol=1e-6)
    np.testing.assert_allclose(terms["next_sentence_accuracy"], (1, 2))
    np.testing.assert_allclose(terms["loss"], (3 * np.log(32), 3), rtol=1e-6)
    assert objective.optimized == ("loss", "next_sentence")
    assert {name: float(weight) for name, weight in objective.weights(examples).items()} == {
        "loss": 3,
        "next_sentence": 2,
    }


def test_the_transformer_pays_for_masked_positions_only_and_loses_none():
    setting = config("mlm", objective={"mask_rate": 0.3})
    objective = make_objective(setting, TOKENIZER)
    rows = [row(document("a quick fox ok")), row(document("lazy"), document("dog"))]
    examples = batch(objective, *(objective.view(r, rng(i), no_sample) for i, r in enumerate(rows)))
    model, variables = init(setting, TOKENIZER, examples)
    terms = jax.jit(lambda b: model.apply(variables, b, method=objective.terms))(examples)

    outputs = jax.jit(model.apply)(variables, examples)["mlm_logits"]
    assert outputs.shape == (2, 16, 32)
    log_p = jax.nn.log_softmax(outputs)
    nll = -np.take_along_axis(np.asarray(log_p), examples["targets"][..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(terms["loss"], (np.sum(nll * examples["weights"]), 4 + 2), rtol=1e-5)

    def shapes(b):
        return model.apply(variables, b, method=objective.terms, capture_intermediates=lambda m, _: m.name == "dense")

    captured = jax.eval_shape(shapes, examples)[1]["intermediates"]["heads"]["mlm"]["dense"]["__call__"][0]
    assert captured.shape == (2, objective.num_predictions, 16) and objective.num_predictions == 5


def test_a_tokenizer_without_a_mask_is_refused():
    with pytest.raises(ConfigError, match="mask token"):
        objective_for(tokenizer=Letters(mask_id=None))


def test_no_room_for_a_pair_is_refused():
    with pytest.raises(ConfigError, match="data.length of at least 5"):
        next_sentence_objective(4)


def test_predictions_are_gathered_by_weight_and_their_gradient_goes_back_there():
    generator = np.random.default_rng(0)
    weights = np.array([[0.0, 2.0, 0.0, 1.0, 0.0], [3.0, 0.0, 0.0, 0.0, 1.0]])
    values, factors = generator.standard_normal((2, 5, 3)), generator.standard_normal((2, 2, 3))

    def total(x):
        found_weights, found = gather_predictions(jnp.asarray(weights), 2, x)
        return jnp.sum(factors * found), (found_weights, found)

    gradient, (found_weights, found) = jax.grad(total, has_aux=True)(jnp.asarray(values, jnp.float32))
    places = np.array([[1, 3], [0, 4]])
    expected = np.zeros_like(values)
    expected[np.arange(2)[:, None], places] = factors
    np.testing.assert_array_equal(found_weights, [[2.0, 1.0], [3.0, 1.0]])
    np.testing.assert_allclose(found, values[np.arange(2)[:, None], places], rtol=1e-6)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
