"""Cached decoding against the full forward pass, and what `generate` promises about batches, padding and stops."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.config import Experts, Model
from lmx.errors import LmxError
from lmx.generation import decode
from lmx.generation.decode import Rules, advance, first, loop, prefill
from lmx.generation.generate import _row_keys, bucket, generate, pad_prompts
from lmx.generation.sampling import make_sampling
from lmx.models.transformer import Transformer

VOCAB = 19
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [7]]
NEW = [[8, 2, 9, 4], [5, 5, 1, 3], [2, 18, 6, 7]]


def make(architecture="decoder", **fields):
    """A model, and parameters that all matter: no bias is 0 and no two logits are nearly equal."""
    defaults = {"vocab_size": VOCAB, "num_layers": 2, "embed_dim": 16, "num_heads": 4, "mlp_dim": 24, "max_length": 16}
    model = Transformer(Model(architecture=architecture, **defaults | fields))
    names = ("encoder_tokens", "decoder_tokens") if architecture == "encoder_decoder" else ("tokens",)
    batch = dict.fromkeys(names, jnp.ones((1, 4), jnp.int32))
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))["params"]
    rng = np.random.default_rng(0)

    def values(path, leaf):
        around = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(around, 0.3, leaf.shape), jnp.float32)

    return model, jax.tree.map_with_path(values, shapes)


def full_logits(model, params, prompts, new, prefix_lm=False):
    """Scores after each prompt and after each of its new tokens, by one forward pass without a cache."""
    steps = len(new[0])
    if model.config.architecture == "encoder_decoder":
        tokens, segments = pad_prompts(prompts, 8, 0, left=False)
        batch = {"encoder_tokens": tokens, "encoder_segments": segments}
        batch["decoder_tokens"] = np.array([[0, *row] for row in new], np.int32)
        ends = [0] * len(prompts)
    else:
        rows = [[*prompt, *row] for prompt, row in zip(prompts, new, strict=True)]
        tokens, segments = pad_prompts(rows, model.config.max_length, 0, left=False)
        batch = {"tokens": tokens, "segments": segments}
        ends = [len(prompt) - 1 for prompt in prompts]
        if prefix_lm:
            batch["prefix"] = (np.arange(tokens.shape[1]) <= np.array(ends)[:, None]).astype(np.int32)
    logits = np.asarray(_full(model, params, batch))
    return np.stack([row[end : end + 1 + steps] for row, end in zip(logits, ends, strict=True)])


@functools.partial(jax.jit, static_argnums=0)
def _full(model, params, batch):
    return model.apply({"params": params}, batch)["lm_logits"]


_advance = jax.jit(advance, static_argnums=0)


def cached_logits(model, params, prompts, new, length, prefix_lm=False):
    """The same from the cache, for a batch of prompts padded to ``length``: [batch, 1 + new, vocab]."""
    left = model.config.architecture == "decoder"
    tokens, segments = pad_prompts(prompts, length, 0, left=left)
    arguments = {"new_slots": len(new[0]), "bidirectional_prompt": prefix_lm}
    logits, decoding = prefill(model, params, tokens, segments, **arguments)
    steps = [logits]
    for column in np.asarray(new).T:
        logits, decoding = _advance(model, params, column, decoding)
        steps.append(logits)
    return np.stack(steps, axis=1)


def assert_cache_agrees(model, params, length=8, prefix_lm=False):
    found = cached_logits(model, params, PROMPTS, NEW, length, prefix_lm)
    expected = full_logits(model, params, PROMPTS, NEW, prefix_lm)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.ptp(expected, axis=1).max() > 1.0  # logits that hardly change would agree whatever the cache does


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "relative", "none"])
@pytest.mark.parametrize("kind", ["causal", "prefix_lm", "encoder_decoder"])
def test_cached_logits_are_those_of_the_full_forward_pass(kind, position):
    architecture = "encoder_decoder" if kind == "encoder_decoder" else "decoder"
    model, params = make(architecture, position=position)
    assert_cache_agrees(model, params, prefix_lm=kind == "prefix_lm")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_kv_heads": 2, "position": "rotary"},
        {"num_kv_heads": 1, "position": "relative"},
        {"attention_windows": (0, 3), "num_layers": 4},
        {"norm_position": "post", "position": "sinusoidal"},
        {"scan_layers": False, "position": "rotary", "attention_windows": (2,)},
        {"experts": Experts(num_experts=3, eval_capacity_factor=3.0)},
        {"experts": Experts(num_experts=3, eval_capacity_factor=3.0), "scan_layers": False},
    ],
    ids=["grouped", "multi-query", "windows", "post-norm", "unrolled-window", "switch", "switch-unrolled"],
)
def test_cached_logits_of_other_settings(fields):
    model, params = make(**fields)
    assert_cache_agrees(model, params)


def test_cached_logits_of_an_unrolled_encoder_decoder_with_unequal_stacks():
    model, params = make("encoder_decoder", num_layers=1, num_decoder_layers=3, scan_layers=False, num_kv_heads=2)
    assert_cache_agrees(model, params)


@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_a_batch_of_unequal_prompts_is_each_prompt_alone_at_any_padding(architecture):
    model, params = make(architecture)
    together = cached_logits(model, params, PROMPTS, NEW, 11)
    for row, (prompt, new) in enumerate(zip(PROMPTS, NEW, strict=True)):
        alone = cached_logits(model, params, [prompt], [new], len(prompt))[0]
        np.testing.assert_allclose(together[row], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["causal", "prefix_lm", "encoder_decoder"])
def test_greedy_takes_the_likeliest_token_of_the_full_forward_pass(kind):
    model, params = make("encoder_decoder" if kind == "encoder_decoder" else "decoder", position="relative")
    prefix_lm = kind == "prefix_lm"
    rows = generate(model, params, PROMPTS, max_new_tokens=6, bidirectional_prompt=prefix_lm)
    assert rows == full_logits(model, params, PROMPTS, rows, prefix_lm)[:, :-1].argmax(-1).tolist()


def test_rows_end_with_their_first_stop_token_and_others_go_on():
    model, params = make()
    free = generate(model, params, PROMPTS, max_new_tokens=8)
    stop = free[0][3]
    rows = generate(model, params, PROMPTS, max_new_tokens=8, stop_ids=[stop, VOCAB + 1])
    for row, longer in zip(rows, free, strict=True):
        end = longer.index(stop) + 1 if stop in longer else 8
        assert row == longer[:end]
    assert len(rows[0]) <= 4


def run_loop(model, params, stops, pad_id):
    tokens, segments = pad_prompts(PROMPTS, 8, 0, left=True)
    logits, decoding = prefill(model, params, tokens, segments, new_slots=8)
    rules = decode.Rules(make_sampling(), _row_keys(0, 3), jnp.asarray(stops), pad_id)
    return decode.loop(model, params, decode.first(logits, rules, 8), decoding, rules, 8)


def test_the_loop_ends_when_all_rows_have_stopped_and_pads_those_that_did():
    model, params = make()
    generated, decoding = run_loop(model, params, range(VOCAB), 0)
    assert int(generated.count) == 1 and int(decoding.cache.index) == 8
    assert generated.tokens[:, 1:].tolist() == [[0] * 7] * 3

    free = generate(model, params, PROMPTS, max_new_tokens=8)
    stop = free[0][3]
    lengths = [row.index(stop) + 1 if stop in row else 8 for row in free]
    assert min(lengths) < max(lengths)
    generated, _ = run_loop(model, params, [stop], 7)
    assert int(generated.count) == max(lengths)
    expected = [row[:end] + [7] * (8 - end) for row, end in zip(free, lengths, strict=True)]
    assert generated.tokens.tolist() == expected


def test_sampling_repeats_with_its_seed_and_rows_do_not_depend_on_each_other():
    model, params = make()
    arguments = {"max_new_tokens": 8, "temperature": 1.5}
    rows = generate(model, params, PROMPTS, seed=1, **arguments)
    assert generate(model, params, PROMPTS, seed=1, **arguments) == rows
    assert generate(model, params, PROMPTS, seed=2, **arguments) != rows
    assert generate(model, params, PROMPTS[:1], seed=1, **arguments) == rows[:1]
    assert generate(model, params, [PROMPTS[0], [2] * 8, [9]], seed=1, **arguments)[0] == rows[0]
    same = generate(model, params, [[1, 2]] * 2, seed=1, **arguments)
    assert same[0] != same[1]


def test_every_step_draws_anew():
    model, params = make()
    even = jax.tree.map(jnp.zeros_like, params)  # all tokens are equally likely, always
    assert len(set(generate(model, even, [[1]], max_new_tokens=8, temperature=1.0)[0])) >= 4


def test_top_k_of_one_is_greedy():
    model, params = make()
    arguments = {"max_new_tokens": 6, "temperature": 5.0}
    greedy = generate(model, params, PROMPTS, max_new_tokens=6)
    assert generate(model, params, PROMPTS, top_k=1, **arguments) == greedy
    assert generate(model, params, PROMPTS, top_p=1e-6, **arguments) == greedy
    assert generate(model, params, PROMPTS, **arguments) != greedy


def test_lengths_within_a_bucket_share_one_program():
    model, params = make(position="rotary", max_length=17)
    generate(model, params, [[1] * 5], max_new_tokens=5)
    compiled = [function._cache_size() for function in (prefill, first, loop)]
    generate(model, params, [[2] * 8], max_new_tokens=7)
    assert [function._cache_size() for function in (prefill, first, loop)] == compiled
    assert [bucket(n) for n in (1, 2, 3, 9, 64, 65, 128, 129)] == [1, 2, 4, 16, 64, 128, 128, 192]


def test_learned_positions_are_filled_to_the_last_and_not_beyond():
    model, params = make(max_length=12)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9]]  # a power of two would be 16
    rows = generate(model, params, prompts, max_new_tokens=3)
    assert rows == full_logits(model, params, prompts, rows)[:, :-1].argmax(-1).tolist()
    with pytest.raises(LmxError, match=r"9 tokens and 4 new ones do not fit model.max_length \(12\)"):
        generate(model, params, prompts, max_new_tokens=4)
    model, params = make(max_length=12, position="rotary")
    assert len(generate(model, params, prompts, max_new_tokens=9)[0]) == 9


@pytest.mark.parametrize(
    "fields, arguments, message",
    [
        ({"architecture": "encoder", "heads": ("mlm",)}, {}, "encoder reads text and cannot generate"),
        ({"heads": ("classification",)}, {}, "needs the head 'lm'"),
        ({}, {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({}, {"prompts": [[1], []]}, "a prompt is empty"),
    ],
)
def test_what_cannot_be_generated_is_said(fields, arguments, message):
    model, params = make(**fields)
    with pytest.raises(LmxError, match=message):
        generate(model, params, **{"prompts": [[1]], "max_new_tokens": 2} | arguments)


def test_no_prompts_give_no_rows():
    model, params = make()
    assert generate(model, params, [], max_new_tokens=2) == []


@pytest.mark.parametrize(("rows", "int8"), [(1, False), (2, False), (1, True)])
def test_the_loop_writes_into_the_cache_without_copying_it(rows, int8):
    model, params = make(max_length=128, embed_dim=32, scan_layers=False)
    tokens = jnp.ones((rows, 32), jnp.int32)
    logits, decoding = prefill(model, params, tokens, tokens, new_slots=64, int8_cache=int8)
    rules = Rules(make_sampling(), _row_keys(0, rows), jnp.zeros(0, jnp.int32), 0)
    leaves, structure = jax.tree.flatten((first(logits, rules, 64), decoding))

    def generated(leaves):
        return loop.__wrapped__(model, params, *structure.unflatten(leaves), rules, jnp.int32(60))

    program = jax.jit(generated, donate_argnums=0).lower(leaves).compile().as_text()
    size = rows * 4 * 96 * 8  # heads, slots and their width
    copied = re.findall(r"= (?:f32|s8)\[([\d,]+)\]\S* copy\(%?(?:get-tuple-element|copy)", program)
    assert "dynamic-update-slice" in program
    assert size not in [math.prod(map(int, shape.split(","))) for shape in copied]


def test_the_loop_takes_the_memory_of_what_it_is_given():
    model, params = make(max_length=128)
    tokens = jnp.ones((2, 32), jnp.int32)
    logits, decoding = prefill(model, params, tokens, tokens, new_slots=64)
    rules = Rules(make_sampling(), _row_keys(0, 2), jnp.zeros(0, jnp.int32), 0)
    loop(model, params, first(logits, rules, 64), decoding, rules, jnp.int32(2))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(decoding.variables))
