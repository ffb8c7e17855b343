"""Beam search against a search in plain loops and against all texts there are; transformers is in tests/interop."""

import itertools

import numpy as np
import pytest

from lmx.errors import LmxError
from lmx.generation.generate import generate
from tests.generation.test_decode import PROMPTS, full_logits, make

STOP = 5


def log_likelihoods(model, params, prompt, texts):
    """Of each text after the prompt, token by token, by one forward pass."""
    longest = max(map(len, texts))
    padded = [[*text, *[0] * (longest - len(text))] for text in texts]
    logits = np.float64(full_logits(model, params, [prompt] * len(texts), padded))[:, :-1]
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return [sum(row[i, token] for i, token in enumerate(text)) for row, text in zip(logits, texts, strict=True)]


def by_loops(model, params, prompt, most, num_beams, penalty):
    """The best text, following ``num_beams`` at a time, every one scored from the prompt on."""
    vocab = model.config.vocab_size
    running, finished = [[]], []
    for length in range(1, most + 1):
        candidates = [[*text, token] for text in running for token in range(vocab)]
        scores = log_likelihoods(model, params, prompt, candidates)
        ranked = sorted(zip(scores, candidates, strict=True), key=lambda pair: -pair[0])
        ends = [text[-1] == STOP or length == most for _, text in ranked]
        finished += [(s / length**penalty, t) for (s, t), end in zip(ranked[:num_beams], ends, strict=False) if end]
        finished = sorted(finished, key=lambda pair: -pair[0])[:num_beams]
        alive = [(s, t) for (s, t), end in zip(ranked, ends, strict=True) if not end][:num_beams]
        if not alive or (len(finished) == num_beams and alive[0][0] / length**penalty <= finished[-1][0]):
            break
        running = [text for _, text in alive]
    return finished[0][1]


@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_rows_are_those_of_a_search_in_loops(architecture):
    model, params = make(architecture, position="relative")
    arguments = {"max_new_tokens": 4, "stop_ids": [STOP]}
    greedy, found = generate(model, params, PROMPTS, **arguments), []
    for penalty in (0.0, 1.0, 2.0):
        rows = generate(model, params, PROMPTS, num_beams=3, length_penalty=penalty, **arguments)
        assert rows == [by_loops(model, params, prompt, 4, 3, penalty) for prompt in PROMPTS]
        found.append(rows)
    assert any(rows != greedy for rows in found) and any(rows != found[0] for rows in found)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_beams_for_every_token_find_the_likeliest_text_of_all(scan_layers):
    model, params = make(scan_layers=scan_layers)
    vocab = model.config.vocab_size
    texts = [list(text) for text in itertools.product(range(vocab), repeat=2)]
    for prompt in PROMPTS:
        best = texts[int(np.argmax(log_likelihoods(model, params, prompt, texts)))]
        assert generate(model, params, [prompt], max_new_tokens=2, num_beams=vocab) == [best]


def test_eight_bits_in_the_cache_follow_their_beams():
    model, params = make(position="rotary")
    arguments = {"max_new_tokens": 6, "num_beams": 3}
    exact = generate(model, params, PROMPTS, **arguments)
    assert generate(model, params, PROMPTS, int8_cache=True, **arguments) == exact


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1, not 0"),
        ({"num_beams": 2, "temperature": 0.5}, "several beams look for the likeliest text"),
    ],
)
def test_what_beams_cannot_do_is_said(arguments, message):
    model, params = make()
    with pytest.raises(LmxError, match=message):
        generate(model, params, PROMPTS, max_new_tokens=2, **arguments)
