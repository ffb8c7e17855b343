import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.errors import ConfigError, DataError
from lmx.objectives import make_objective

from .stubs import BOS, EOS, Letters, Oracle, batch, config, init, no_sample, rng

TOKENIZER = Letters()


def objective_for(task="classification", model=None, tokenizer=TOKENIZER, **data):
    setting = config(
        "classification",
        model=model or {},
        data={"length": 12} | data,
        objective={"task": task, "label_smoothing": 0.1},
    )
    return make_objective(setting, tokenizer)


def view(objective, **record):
    return objective.view(record, rng(), no_sample)


def test_a_single_text():
    objective = objective_for(labels=("bad", "good"))
    example = view(objective, text="ab", label="good")
    assert example["tokens"].tolist() == [BOS, *TOKENIZER.encode("ab"), EOS]
    assert example["segments"].tolist() == [1, 1, 1, 1] and example["positions"].tolist() == [0, 1, 2, 3]
    assert example["labels"] == 1 and example["labels"].dtype == np.int32 and example["label_weights"] == 1
    assert "token_types" not in example


def test_a_pair_has_token_types_and_the_longer_text_is_cut():
    objective = objective_for(model={"num_token_types": 2}, pair_field="second", too_long="cut")
    example = view(objective, text="abcdefghijkl", second="xy", label=0)
    a, b = TOKENIZER.encode("abcdefg"), TOKENIZER.encode("xy")
    assert example["tokens"].tolist() == [BOS, *a, EOS, *b, EOS]
    assert example["token_types"].tolist() == [0] * 9 + [1] * 3
    both = view(objective, text="abcdefghijkl", second="zyxwvuts", label=0)
    assert both["token_types"].tolist() == [0] * 7 + [1] * 5  # nine tokens of room: five and four


def test_without_special_tokens_the_text_stands_alone():
    objective = objective_for(tokenizer=Letters(cls_id=None, sep_id=None))
    assert view(objective, text="ab", label=1)["tokens"].tolist() == TOKENIZER.encode("ab")
    with pytest.raises(DataError, match="empty"):
        view(objective, text="", label=1)


def test_labels_are_names_or_indices():
    objective = objective_for(labels=("bad", "good"))
    assert [int(view(objective, text="a", label=label)["labels"]) for label in (0, 1, "bad", b"good")] == [0, 1, 0, 1]
    stars = objective_for(labels=("1", "2"))
    assert [int(view(stars, text="a", label=label)["labels"]) for label in (1, 2, "2")] == [0, 1, 1]


@pytest.mark.parametrize(
    ("labels", "label"),
    [(("bad", "good"), 2), (("bad", "good"), -1), (("bad", "good"), "ugly"), (("1", "2"), 0), ((), "bad")],
)
def test_an_unknown_label_is_refused(labels, label):
    with pytest.raises(DataError, match="neither a name of a class nor an index below model.num_classes"):
        view(objective_for(labels=labels), text="a", label=label)


def test_missing_fields_and_impossible_settings_are_named():
    with pytest.raises(DataError, match="no field 'label' .*it has 'text'"):
        view(objective_for(), text="a")
    with pytest.raises(ConfigError, match="set model.num_classes=3"):
        objective_for(labels=("a", "b", "c"))
    with pytest.raises(ConfigError, match="data.length must be at least 5, not 4"):
        objective_for(pair_field="second", length=4)
    with pytest.raises(ConfigError, match="reads one stack"):
        objective_for(model={"architecture": "encoder_decoder"})


def test_inputs_need_no_label():
    assert objective_for().inputs({"text": "ab"})["tokens"].tolist() == [BOS, *TOKENIZER.encode("ab"), EOS]


def test_classification_terms_by_hand():
    objective = objective_for()
    examples = {"labels": jnp.array([0, 1, 0]), "label_weights": jnp.array([1.0, 1.0, 0.0])}
    scores = np.log(np.array([[0.75, 0.25], [0.75, 0.25], [0.5, 0.5]], np.float32))
    terms = objective.terms(Oracle(0.0, scores), examples)
    nll = -np.log(0.75) - np.log(0.25)
    np.testing.assert_allclose(terms["loss"], (nll, 2), rtol=1e-6)
    np.testing.assert_allclose(terms["accuracy"], (1, 2))
    np.testing.assert_allclose(objective.weights(examples)["loss"], 2)
    smoothed = 0.9 * nll + 0.1 * -(np.log(0.75) + np.log(0.25))
    np.testing.assert_allclose(objective.terms(Oracle(0.0, scores), examples, True)["loss"], (smoothed, 2), rtol=1e-6)


def test_regression():
    objective = objective_for("regression", model={"num_classes": 1})
    example = view(objective, text="a", label=3)
    assert example["labels"] == 3.0 and example["labels"].dtype == np.float32
    examples = {"labels": np.array([3.0, 1.0], np.float32), "label_weights": np.array([1, 0], np.float32)}
    terms = objective.terms(Oracle(0.0, np.array([[2.5], [9.0]], np.float32)), examples)
    np.testing.assert_allclose(terms["loss"], (0.25, 1))
    np.testing.assert_allclose(terms["mse"], (0.25, 1))
    with pytest.raises(DataError, match="finite number"):
        view(objective, text="a", label="three")


def test_the_transformer_gives_padding_no_say():
    setting = config("classification", data={"length": 12})
    short = make_objective(setting, TOKENIZER)
    long = make_objective(setting.replace(data={"length": 16}), TOKENIZER)
    examples = [view(short, text=text, label=label) for text, label in (("abc", 0), ("hello you", 1))]
    model, variables = init(setting, TOKENIZER, batch(short, *examples))
    run = jax.jit(lambda b: model.apply(variables, b, method=short.terms))
    a, b = run(batch(short, *examples)), run(batch(long, *examples))
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    assert a["loss"][1] == 2 and a["accuracy"] == b["accuracy"]
