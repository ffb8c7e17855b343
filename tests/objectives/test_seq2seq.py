import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.errors import DataError
from lmx.objectives import make_objective

from .stubs import BOS, EOS, PAD, Letters, Oracle, batch, config, init, no_sample, rng

TOKENIZER = Letters()


def view(objective, source, target):
    return objective.view({"source": source, "target": target}, rng(), no_sample)


def test_a_record_becomes_both_sides():
    objective = make_objective(config("seq2seq"), TOKENIZER)
    a, b, c = TOKENIZER.encode("abc")
    example = view(objective, "ab", b"cba")
    assert example["encoder_tokens"].tolist() == [a, b, EOS]
    assert example["decoder_tokens"].tolist() == [PAD, c, b, a]
    assert example["decoder_targets"].tolist() == [c, b, a, EOS]
    assert example["decoder_weights"].tolist() == [1, 1, 1, 1]
    assert set(example) == set(objective.lengths)
    assert objective.cut is None


def test_start_without_a_pad_token():
    objective = make_objective(config("seq2seq"), Letters(pad_id=None))
    assert view(objective, "a", "b")["decoder_tokens"][0] == BOS


@pytest.mark.parametrize("packing", [True, False])
def test_packable_follows_the_config(packing):
    assert make_objective(config("seq2seq", data={"packing": packing}), TOKENIZER).packable is packing


def test_the_longest_that_fits_and_the_first_that_does_not():
    objective = make_objective(config("seq2seq", data={"length": 6, "target_length": 4}), TOKENIZER)
    assert len(view(objective, "abcde", "abc")["encoder_tokens"]) == 6
    with pytest.raises(DataError, match=r"'source'.*starts 'abcdef' has 7 tokens.*raise data.length"):
        view(objective, "abcdef", "abc")
    with pytest.raises(DataError, match=r"'target'.*has 5 tokens.*raise data.target_length"):
        view(objective, "a", "abcd")


def test_bad_records_are_named():
    objective = make_objective(config("seq2seq"), TOKENIZER)
    with pytest.raises(DataError, match=r"no field 'source' \(data.source_field\); it has 'english', 'target'"):
        objective.view({"english": "a", "target": "b"}, rng(), no_sample)
    with pytest.raises(DataError, match="should hold text, not 3"):
        view(objective, "a", 3)
    with pytest.raises(DataError, match="not UTF-8"):
        view(objective, b"\xff", "a")


def test_exact_match_counts_examples_also_in_packed_rows():
    objective = make_objective(config("seq2seq", data={"target_length": 6}), TOKENIZER)
    targets = np.array([[5, 6, EOS, 7, EOS, 0], [8, EOS, 0, 0, 0, 0]])
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]])
    examples = {
        "decoder_targets": targets,
        "decoder_segments": segments,
        "decoder_weights": (segments > 0).astype(np.float32),
    }
    predicted = targets.copy()
    predicted[0, 1] = 9  # one token of the first of three examples is wrong
    predicted[segments == 0] = 11  # padding does not count
    examples = {name: jnp.asarray(value) for name, value in examples.items()}
    terms = objective.terms(Oracle(np.eye(32, dtype=np.float32)[predicted]), examples)
    np.testing.assert_allclose(terms["exact_match"], (2, 3))
    np.testing.assert_allclose(terms["accuracy"], (6, 7))


def test_the_transformer_scores_packed_examples_as_it_scores_them_alone():
    setting = config("seq2seq")
    objective = make_objective(setting, TOKENIZER)
    examples = [view(objective, "abc", "cba"), view(objective, "hello", "olleh")]
    alone = batch(objective, *examples)
    together = {name: np.concatenate([example[name] for example in examples]) for name in examples[0]}
    for side in ("encoder", "decoder"):
        together[f"{side}_segments"] = np.repeat([1, 2], [len(example[f"{side}_tokens"]) for example in examples])
    packed = batch(objective, together)
    model, variables = init(setting, TOKENIZER, packed)
    run = jax.jit(lambda b: model.apply(variables, b, method=objective.terms))
    one, two = run(packed), run(alone)
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-5)
    assert one["exact_match"][1] == two["exact_match"][1] == 2
    assert one["accuracy"] == two["accuracy"]
