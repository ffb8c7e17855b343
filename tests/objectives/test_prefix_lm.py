import numpy as np

from lmx.objectives import make_objective

from .stubs import BOS, EOS, Letters, batch, config, init, no_sample, rng, row


def test_only_targets_behind_the_prefix_count():
    objective = make_objective(config("prefix_lm"), Letters())
    documents = [[BOS, 10, 11, 12, 13], [BOS, 20, 21], [BOS]]
    prefix_sizes = {1: set(), 2: set(), 3: set()}
    for seed in range(200):
        example = objective.view(row(*documents), rng(seed), no_sample)
        assert example["targets"].tolist() == [10, 11, 12, 13, EOS, 20, 21, EOS, EOS]
        for segment, sizes in prefix_sizes.items():
            inside = example["segments"] == segment
            prefix, weights = example["prefix"][inside], example["weights"][inside]
            size = int(prefix.sum())
            sizes.add(size)
            assert prefix.tolist() == [1] * size + [0] * (len(prefix) - size)
            assert weights.tolist() == [0] * (size - 1) + [1] * (len(prefix) - size + 1)
    assert prefix_sizes == {1: {1, 2, 3, 4, 5}, 2: {1, 2, 3}, 3: {1}}


def test_split_points_are_uniform():
    objective = make_objective(config("prefix_lm"), Letters())
    generator = rng()
    sizes = [objective.view(row([BOS, 10, 11, 12]), generator, no_sample)["prefix"].sum() for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(sizes, minlength=5)[1:] / 4000, 0.25, atol=0.03)


def test_the_transformer_does_not_see_what_it_predicts():
    tokenizer = Letters()
    setting = config("prefix_lm")
    objective = make_objective(setting, tokenizer)
    example = objective.view(row([BOS, *range(10, 22)]), rng(3), no_sample)
    size = int(example["prefix"].sum())
    assert 2 < size < 12
    model, variables = init(setting, tokenizer, batch(objective, example))

    def predict(tokens):
        examples = batch(objective, example | {"tokens": tokens})
        hidden = model.apply(variables, examples, method=model.hidden)
        return model.apply(variables, hidden, method=model.lm_logits)[0]

    before = predict(example["tokens"])
    behind = example["tokens"].copy()
    behind[size] += 1
    np.testing.assert_array_equal(before[:size], predict(behind)[:size])
    inside = example["tokens"].copy()
    inside[size - 1] += 1
    assert np.abs(before[0] - predict(inside)[0]).max() > 1e-4  # the prefix itself is read in both directions
