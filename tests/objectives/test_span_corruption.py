import jax
import numpy as np
import pytest

from lmx.errors import ConfigError
from lmx.objectives import make_objective
from lmx.objectives.span_corruption import noise_counts, noise_mask, window_lengths

from .stubs import EOS, PAD, Letters, batch, config, corpus, init, no_sample, rng, row

TOKENIZER = Letters(sentinels=8)


def objective_for(length=32, tokenizer=TOKENIZER, **options):
    setting = config("span_corruption", data={"length": length}, objective=options)
    return make_objective(setting, tokenizer)


def restored(inputs, targets, sentinels):
    """The raw tokens: each sentinel of the inputs replaced by what follows it in the targets."""
    noise, current = {}, None
    for token in targets:
        if token in sentinels:
            current = noise.setdefault(token, [])
        else:
            current.append(token)
    return [t for token in inputs for t in (noise.pop(token) if token in sentinels else [token])]


def test_lengths_are_those_of_t5():
    assert window_lengths(512, 0.15, 3.0) == (568, 114)  # Raffel et al. 2020, section 3.1.4 and random_spans_helper
    objective = objective_for(512, Letters(sentinels=28))
    assert objective.cut.length == 568
    assert objective.lengths["encoder_tokens"] == 512
    assert objective.lengths["decoder_tokens"] == objective.lengths["decoder_targets"] == 114


@pytest.mark.parametrize("length", [3, 4, 16, 33, 128, 511])
@pytest.mark.parametrize(("density", "span"), [(0.15, 3.0), (0.5, 3.0), (0.15, 1.0), (0.15, 8.0), (0.3, 2.5)])
def test_full_windows_fill_the_encoder_and_shorter_ones_fit(length, density, span):
    raw, target_length = window_lengths(length, density, span)
    sizes = []
    for size in range(2, raw + 1):
        noise, spans = noise_counts(size, density, span)
        assert 1 <= spans <= noise < size
        sizes.append((size - noise + spans + 1, noise + spans + 1))
    assert sizes[-1] == (length, target_length)
    assert sizes == sorted(sizes) and max(target for _, target in sizes) == target_length


@pytest.mark.parametrize("size", [*range(1, 12), 34])
def test_inputs_and_targets_restore_the_text(size):
    objective = objective_for()
    assert objective.cut.length == 34
    tokens = rng(size).integers(13, 40, size)
    for seed in range(10):
        example = objective.view(row(tokens), rng(seed), no_sample)
        inputs, targets = example["encoder_tokens"].tolist(), example["decoder_targets"].tolist()
        assert inputs.pop() == EOS and targets.pop() == EOS
        assert len(inputs) < objective.lengths["encoder_tokens"] and len(targets) < objective.lengths["decoder_tokens"]
        in_inputs = [token for token in inputs if token in TOKENIZER.sentinel_ids]
        in_targets = [token for token in targets if token in TOKENIZER.sentinel_ids]
        assert in_inputs == list(TOKENIZER.sentinel_ids[: len(in_inputs)])
        if size > 1:  # a lone token is kept
            assert in_inputs == in_targets and targets[0] == in_targets[0]
        assert restored(inputs, targets, TOKENIZER.sentinel_ids) == tokens.tolist()


def test_a_whole_corpus_is_restored():
    objective = objective_for()
    documents = np.split(np.arange(13, 313), [5, 90, 91, 200])
    raw = []
    for index, window in enumerate(corpus(*documents).rows(objective.cut)):
        example = objective.view(window, rng(index), no_sample)
        raw += restored(example["encoder_tokens"][:-1], example["decoder_targets"][:-1], TOKENIZER.sentinel_ids)
    assert raw == list(range(13, 313))


def test_a_full_row_and_its_decoder_inputs():
    objective = objective_for()
    example = objective.view(row(range(13, 47)), rng(), no_sample)
    assert {name: len(array) for name, array in example.items()} == objective.lengths
    assert example["decoder_tokens"].tolist() == [PAD, *example["decoder_targets"][:-1]]
    for side in ("encoder", "decoder"):
        length = objective.lengths[f"{side}_tokens"]
        assert example[f"{side}_segments"].tolist() == [1] * length
        assert example[f"{side}_positions"].tolist() == list(range(length))
    assert example["decoder_weights"].tolist() == [1] * objective.lengths["decoder_tokens"]


def test_noise_has_the_density_and_the_span_lengths():
    generator = rng()
    masks = [noise_mask(200, 0.15, 3.0, generator) for _ in range(500)]
    assert {int(mask.sum()) for mask in masks} == {30}
    assert {int((np.diff(mask.astype(int)) == 1).sum()) for mask in masks} == {10}
    assert not any(mask[0] for mask in masks) and all(mask[-1] for mask in masks)
    edges = [np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0)) for mask in masks]
    lengths = np.concatenate([edge[1::2] - edge[::2] for edge in edges])
    # Of the ways to split 30 tokens into 10 spans, C(28, 8) in C(29, 9) begin with a span of one token.
    np.testing.assert_allclose(np.mean(lengths == 1), 9 / 29, atol=0.03)


def test_too_few_sentinels_are_refused_with_the_number_needed():
    with pytest.raises(ConfigError, match="has 0; set tokenizer.num_sentinels to at least 28"):
        objective_for(512, Letters())


def test_a_rate_of_one_is_refused():
    with pytest.raises(ConfigError, match="objective.mask_rate must be between 0 and 1"):
        objective_for(mask_rate=1.0)


def test_the_transformer_counts_every_target_and_no_padding():
    setting = config("span_corruption", data={"length": 32})
    objective = make_objective(setting, TOKENIZER)
    rows = [row(range(13, 40)), row([20, 21, 22])]
    examples = batch(objective, *(objective.view(r, rng(), no_sample) for r in rows))
    model, variables = init(setting, TOKENIZER, examples)
    run = jax.jit(lambda b: model.apply(variables, b, method=objective.terms))
    terms = run(examples)
    assert terms["loss"][1] == objective.weights(examples)["loss"] == (4 + 1 + 1) + (1 + 1 + 1)
    padded = examples["decoder_segments"] == 0
    noisy = examples | {"decoder_tokens": np.where(padded, 7, examples["decoder_tokens"])}
    np.testing.assert_array_equal(terms["loss"], run(noisy)["loss"])
