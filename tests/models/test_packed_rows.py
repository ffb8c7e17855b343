"""A document in a packed row comes out as it does alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.reference import build, small, tokens

LENGTHS = (4, 3, 5)


def packed(documents, padding=2):
    """One row of all documents, and padding after them."""
    pad = np.zeros(padding, int)
    row = {
        "tokens": np.concatenate([*documents, pad]),
        "segments": np.concatenate([np.full(len(d), i + 1) for i, d in enumerate(documents)] + [pad]),
        "positions": np.concatenate([np.arange(len(d)) for d in documents] + [pad]),
    }
    return {name: jnp.asarray(values, jnp.int32)[None] for name, values in row.items()}


def documents(seed=0, lengths=LENGTHS):
    return [np.asarray(tokens((length,), seed + i)) for i, length in enumerate(lengths)]


def hidden(model, params, batch):
    return np.asarray(_hidden(model, params, batch)[0])


@functools.partial(jax.jit, static_argnums=0)
def _hidden(model, params, batch):
    return model.apply({"params": params}, batch, method=model.hidden)


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "relative", "none"])
@pytest.mark.parametrize("architecture", ["encoder", "decoder"])
def test_packed_is_unpacked(architecture, position, window):
    model, params = build(small(architecture, position=position, attention_windows=(window,)))
    row = packed(documents())
    together = hidden(model, params, row)
    start = 0
    for document in documents():
        alone = hidden(model, params, {"tokens": jnp.asarray(document)[None]})
        np.testing.assert_allclose(together[start : start + len(document)], alone, atol=1e-5)
        start += len(document)
    merged = hidden(model, params, {"tokens": row["tokens"]})  # without segments the documents do mix
    assert not np.allclose(merged[4:12], together[4:12], atol=1e-2)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "relative"])
def test_packed_pairs_of_encoder_and_decoder(position):
    model, params = build(small("encoder_decoder", position=position))
    sources, targets = documents(), documents(7, (2, 5, 3))
    row = {f"encoder_{name}": values for name, values in packed(sources).items()}
    row |= {f"decoder_{name}": values for name, values in packed(targets, padding=1).items()}
    together = hidden(model, params, row)
    start = 0
    for source, target in zip(sources, targets, strict=True):
        pair = {"encoder_tokens": jnp.asarray(source)[None], "decoder_tokens": jnp.asarray(target)[None]}
        np.testing.assert_allclose(together[start : start + len(target)], hidden(model, params, pair), atol=1e-5)
        start += len(target)


def test_prefix_of_one_document_is_not_seen_by_another():
    model, params = build(small("decoder", position="rotary"))
    row = packed(documents())
    prefix = jnp.array([[1, 1, 0, 0, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0]])
    together = hidden(model, params, row | {"prefix": prefix})
    start = 0
    for document in documents():
        part = slice(start, start + len(document))
        alone = {"tokens": jnp.asarray(document)[None], "prefix": prefix[:, part]}
        np.testing.assert_allclose(together[part], hidden(model, params, alone), atol=1e-5)
        start += len(document)


def test_what_stands_in_the_padding_does_not_matter():
    model, params = build(small("encoder"))
    row = packed(documents())
    other = row | {"tokens": row["tokens"].at[:, -2:].set(5)}
    np.testing.assert_array_equal(hidden(model, params, row)[:12], hidden(model, params, other)[:12])
