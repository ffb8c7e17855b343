"""A draft changes how soon tokens come, and not which they are or how likely."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.config import Experts, RotaryScaling
from lmx.errors import LmxError
from lmx.generation import speculative
from lmx.generation.generate import Draft, generate
from lmx.generation.speculative import check
from tests.generation.test_decode import NEW, PROMPTS, make


def noisy(params, scale):
    """Parameters of a model that often, but not always, agrees."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + scale * rng.standard_normal(leaf.shape).astype(np.float32), params)


@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("kind", ["causal", "prefix_lm", "encoder_decoder"])
def test_the_likeliest_tokens_are_those_of_the_model_alone(kind, num_tokens):
    model, params = make("encoder_decoder" if kind == "encoder_decoder" else "decoder", position="relative")
    arguments = {"max_new_tokens": 7, "bidirectional_prompt": kind == "prefix_lm"}
    alone = generate(model, params, PROMPTS, **arguments)
    for scale in (0.0, 0.05, 1.0):  # a draft that is always right, one that mostly is, and one that knows nothing
        draft = Draft(model, noisy(params, scale), num_tokens)
        assert generate(model, params, PROMPTS, draft=draft, **arguments) == alone


def test_a_draft_of_another_size_and_rows_that_stop():
    model, params = make(position="rotary")
    small, small_params = make(position="learned", num_layers=1, embed_dim=8, num_heads=2)
    free = generate(model, params, PROMPTS, max_new_tokens=8)
    stop = free[0][3]
    arguments = {"max_new_tokens": 8, "stop_ids": [stop]}
    draft = Draft(small, small_params, 3)
    assert generate(model, params, PROMPTS, draft=draft, **arguments) == generate(model, params, PROMPTS, **arguments)
    assert generate(model, params, PROMPTS[:1], draft=draft, **arguments) == [free[0][: free[0].index(stop) + 1]]


def test_a_draft_with_fewer_places_than_prompts_are_padded_to():
    (model, params), small = make(position="rotary"), make(position="learned", max_length=13)
    expected = generate(model, params, PROMPTS, max_new_tokens=7)
    assert generate(model, params, PROMPTS, max_new_tokens=7, draft=Draft(*small, 2)) == expected


def test_a_right_draft_needs_a_pass_for_all_it_proposes_and_one_token_more(monkeypatch):
    model, params = make()
    turns = []

    def counted(unfinished, turn, carry):
        while unfinished(carry):
            carry = turn(carry)
            turns.append(int(carry[0].count))
        return carry

    with jax.disable_jit():
        monkeypatch.setattr(speculative.jax.lax, "while_loop", counted)
        generate(model, params, PROMPTS[:1], max_new_tokens=7, draft=Draft(model, params, 2))
    assert turns == [4, 7]


def test_what_is_taken_or_put_in_its_place_has_the_models_distribution():
    rng = np.random.default_rng(0)
    vocab, ahead, rows = 5, 2, 40_000
    likely, wanted = rng.dirichlet(np.ones(vocab), ahead), rng.dirichlet(np.ones(vocab), ahead + 1)
    wanted[0, 3], likely[1, 2] = 0.0, 0.0  # a token that must never come, and one that is never proposed
    wanted[0] /= wanted[0].sum()
    likely[1] /= likely[1].sum()
    proposed = np.stack([rng.choice(vocab, rows, p=p) for p in likely], axis=1)
    taken, others = check(
        jnp.asarray(proposed),
        jnp.broadcast_to(jnp.asarray(likely, jnp.float32), (rows, ahead, vocab)),
        jnp.broadcast_to(jnp.asarray(wanted, jnp.float32), (rows, ahead + 1, vocab)),
        jax.random.split(jax.random.key(0), rows),
    )
    taken, others = np.asarray(taken), np.asarray(others)
    for place in range(ahead + 1):
        reached = taken >= place
        tokens = others[:, place]
        if place < ahead:
            tokens = np.where(taken > place, proposed[:, place], tokens)
        count = reached.sum()
        share = np.bincount(tokens[reached], minlength=vocab) / count
        assert count > 2000
        assert (abs(share - wanted[place]) < 5 * np.sqrt(wanted[place] * (1 - wanted[place]) / count) + 1e-9).all()
    overlap = np.minimum(likely[0], wanted[0]).sum()  # theorem 3.5: how often a proposal is taken
    assert abs((taken > 0).mean() - overlap) < 5 * np.sqrt(overlap * (1 - overlap) / rows)


def test_sampled_text_has_the_distribution_of_the_model_alone():
    model, params = make(position="rotary")
    draft = Draft(model, noisy(params, 0.1), 3)
    arguments = {"max_new_tokens": 3, "temperature": 1.0, "top_k": 4}
    prompts = [PROMPTS[1]] * 256
    pairs = []
    for one in (None, draft):
        rows = [row for seed in range(8) for row in generate(model, params, prompts, seed=seed, draft=one, **arguments)]
        pairs.append(np.bincount([row[1] * 19 + row[2] for row in rows], minlength=19 * 19) / len(rows))
    alone, drafted = pairs
    assert (alone > 0).sum() > 8
    spread = np.sqrt((alone + drafted) / 2 / 2048 * 2)
    assert (abs(alone - drafted) <= 5 * spread + 1e-9).all()


@pytest.mark.parametrize(
    ("fields", "num_tokens", "message"),
    [
        ({"vocab_size": 23}, 2, r"draft's model.vocab_size is 23 and the model's is 19"),
        ({"architecture": "encoder_decoder"}, 2, r"draft's model.architecture is 'encoder_decoder'"),
        ({"experts": Experts(num_experts=3)}, 2, r"the draft's experts drop tokens .*eval_capacity_factor is 0"),
        ({}, 0, r"must propose at least 1 token at a time, not 0"),
        ({"max_length": 5}, 2, r"do not fit the draft's model.max_length \(5\)"),
        (
            {"position": "rotary", "rotary_scaling": RotaryScaling("dynamic")},
            2,
            r"kind='dynamic' .* generate without one",
        ),
    ],
)
def test_a_draft_that_does_not_fit_is_said(fields, num_tokens, message):
    model, params = make()
    with pytest.raises(LmxError, match=message):
        generate(model, params, NEW, max_new_tokens=2, draft=Draft(*make(**fields), num_tokens))
