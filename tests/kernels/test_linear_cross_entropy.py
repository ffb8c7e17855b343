"""The fused last layer against the definition in float64, and what its compiled program holds."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from lmx.config import Mesh
from lmx.kernels import chunks, cross_entropy
from lmx.kernels import linear_cross_entropy as last_layer
from lmx.kernels.linear_cross_entropy import Unembedding, linear_cross_entropy, linear_cross_entropy_reference
from lmx.parallel.sharding import Layout, as_spec, constrain, use_layout
from lmx.planning.collectives import find_collectives


def layer(rng, batch, length, embed, vocab, tied=True, bias=True, dtype=jnp.float32, counting=0.8):
    """A last layer, targets and weights, of which about that part is not zero."""
    shape = (vocab, embed) if tied else (embed, vocab)
    hidden, kernel = rng.standard_normal((batch, length, embed)), rng.standard_normal(shape)
    bias = jnp.asarray(rng.standard_normal(vocab), jnp.float32) if bias else None
    weights = rng.random((batch, length)) * (rng.random((batch, length)) < counting)
    found = Unembedding(jnp.asarray(hidden, dtype), jnp.asarray(kernel, dtype), bias, tied)
    targets = jnp.asarray(rng.integers(vocab, size=(batch, length)), jnp.int32)
    return found, targets, jnp.asarray(weights, jnp.float32)


def by_definition(head, targets, weights, label_smoothing, z_loss):
    """Loss, nll, right, and the loss's gradients by hidden states, kernel and bias, in float64."""
    hidden, kernel = np.float64(head.hidden), np.float64(head.kernel)
    kernel = kernel.T if head.tied else kernel
    logits = hidden @ kernel + (0 if head.bias is None else np.float64(head.bias))
    top = logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top
    vocab = logits.shape[-1]
    wanted = (1 - label_smoothing) * np.eye(vocab)[np.asarray(targets)] + label_smoothing / vocab
    nll = -(wanted * (logits - log_z)).sum(-1) + z_loss * log_z[..., 0] ** 2
    by_logits = np.exp(logits - log_z) * (1 + 2 * z_loss * log_z) - wanted
    by_logits *= np.float64(weights)[..., None]
    by_kernel = np.einsum("ble,blv->ev", hidden, by_logits)
    gradients = (by_logits @ kernel.T, by_kernel.T if head.tied else by_kernel, by_logits.sum((0, 1)))
    return (nll * np.float64(weights)).sum(), nll, (logits.argmax(-1) == np.asarray(targets)) & (vocab > 1), gradients


def with_gradients(function, head, targets, weights, factor=1.0, **options):
    """What ``function`` finds, and the gradients of ``factor`` times its loss."""

    def loss(hidden, kernel, bias):
        scores = function(Unembedding(hidden, kernel, bias, head.tied), targets, weights, **options)
        return factor * scores.loss, scores

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1) if head.bias is None else (0, 1, 2), has_aux=True))
    gradients, scores = gradient(head.hidden, head.kernel, head.bias)
    return scores, gradients


@contextlib.contextmanager
def as_for(platform):
    """What is compiled within is what would be for another platform."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (cross_entropy, last_layer):
            patch.setattr(module, "current_platform", lambda: platform)
        yield


@pytest.mark.parametrize("examples", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_equals_the_definition_whatever_the_shapes_and_chunks(examples):
    @settings(max_examples=examples, deadline=None)
    @given(st.data())
    def check(data):
        batch, length, embed, vocab, chunk = (data.draw(st.integers(1, most)) for most in (4, 9, 6, 20, 300))
        tied, bias = data.draw(st.booleans()), data.draw(st.booleans())
        options = {
            "label_smoothing": data.draw(st.sampled_from([0.0, 0.1])),
            "z_loss": data.draw(st.sampled_from([0.0, 0.01])),
        }
        rng = np.random.default_rng(data.draw(st.integers(0, 100)))
        head, targets, weights = layer(rng, batch, length, embed, vocab, tied, bias)
        loss, nll, right, expected = by_definition(head, targets, weights, **options)
        scores, gradients = with_gradients(
            linear_cross_entropy, head, targets, weights, factor=-3.0, chunk_logits=chunk, **options
        )
        reference, by_reference = with_gradients(
            linear_cross_entropy_reference, head, targets, weights, factor=-3.0, **options
        )
        alone = linear_cross_entropy(head, targets, weights, chunk_logits=chunk, **options)
        with as_for("gpu"):
            also, more = with_gradients(
                linear_cross_entropy, head, targets, weights, factor=-3.0, chunk_logits=50 * chunk, **options
            )
        for found in (scores, alone, also, reference):
            np.testing.assert_allclose(found.loss, loss, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(found.nll, nll, rtol=1e-5, atol=1e-5)
            if found is not also:  # a CPU computes tiny products again in there, and rounds them otherwise
                np.testing.assert_array_equal(found.right, right)
        for *all_found, wanted in zip(gradients, more, by_reference, expected, strict=False):
            for found in all_found:
                np.testing.assert_allclose(found, -3.0 * wanted, rtol=1e-4, atol=1e-4)

    check()


@pytest.mark.parametrize("examples", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_sparse_weights_change_nothing_that_counts(examples):
    @settings(max_examples=examples, deadline=None)
    @given(st.data())
    def check(data):
        batch, length, embed, vocab, chunk = (data.draw(st.integers(1, most)) for most in (4, 9, 6, 20, 300))
        tied, bias = data.draw(st.booleans()), data.draw(st.booleans())
        rng = np.random.default_rng(data.draw(st.integers(0, 100)))
        counting = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
        head, targets, weights = layer(rng, batch, length, embed, vocab, tied, bias, counting=counting)
        loss, nll, right, expected = by_definition(head, targets, weights, 0.1, 0.01)
        options = {"label_smoothing": 0.1, "z_loss": 0.01, "sparse": True}
        scores, gradients = with_gradients(
            linear_cross_entropy, head, targets, weights, factor=-3.0, chunk_logits=chunk, **options
        )
        alone = linear_cross_entropy(head, targets, weights, chunk_logits=chunk, **options)
        counts = np.asarray(weights) > 0
        for found in (scores, alone):
            np.testing.assert_allclose(found.loss, loss, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(found.nll[counts], nll[counts], rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(found.right[counts], right[counts])
        for found, wanted in zip(gradients, expected, strict=False):
            np.testing.assert_allclose(found, -3.0 * wanted, rtol=1e-4, atol=1e-4)

    check()


@pytest.mark.parametrize("count", [8, 40, 64])
def test_where_weights_are_sparse_what_does_not_count_is_not_computed(count):
    """Else what is no number there would be in the gradient of the kernel."""
    head, targets, _ = layer(np.random.default_rng(0), 4, 16, 8, 100)
    counts = np.zeros(64, bool)
    counts[np.random.default_rng(1).permutation(64)[:count]] = True
    counts = counts.reshape(4, 16)
    weights = jnp.asarray(counts, jnp.float32)
    head = head.replace(hidden=jnp.where(counts[..., None], head.hidden, jnp.nan))
    scores, gradients = with_gradients(linear_cross_entropy, head, targets, weights, sparse=True)
    assert all(np.isfinite(x).all() for x in (scores.loss, scores.nll, *gradients))
    assert not scores.nll[~counts].any() and not gradients[0][~counts].any()
    assert gradients[0][counts].any(axis=-1).all()


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_is_multiplied_in_bfloat16_and_summed_in_float32(tied):
    head, targets, weights = layer(np.random.default_rng(0), 2, 32, 64, 100, tied, dtype=jnp.bfloat16)
    scores, gradients = with_gradients(linear_cross_entropy, head, targets, weights, chunk_logits=800)
    loss, nll, _, expected = by_definition(head, targets, weights, 0.0, 0.0)
    assert scores.nll.dtype == jnp.float32 and [x.dtype for x in gradients] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(scores.nll, nll, rtol=1e-4, atol=1e-3)  # only the inputs are rounded, and they are given
    for found, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(np.float64(found), wanted, atol=0.01 * abs(wanted).max())


def test_a_factor_of_the_loss_keeps_its_digits_in_16_bits():
    """In bfloat16 1.3 would be 1.297 for every gradient, and beside another loss this one's weight would be another."""
    head, targets, weights = layer(np.random.default_rng(0), 2, 32, 64, 100, dtype=jnp.bfloat16)
    _, alone = with_gradients(linear_cross_entropy, head, targets, weights)
    _, scaled = with_gradients(linear_cross_entropy, head, targets, weights, factor=1.3)
    for one, many in zip(alone, scaled, strict=True):
        ratio = abs(np.float64(many)).sum() / abs(np.float64(one)).sum()
        assert ratio == pytest.approx(1.3, rel=5e-4)


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_cross_entropy_reference])
def test_no_id_is_likelier_than_one_that_is_right(function):
    head = Unembedding(jnp.array([[[1.0], [1.0], [1.0], [0.0]]]), jnp.array([[1.0], [2.0], [2.0]]))
    scores = function(head, jnp.array([[0, 1, 2, 0]]), jnp.ones((1, 4)))
    np.testing.assert_array_equal(scores.right, [[False, True, True, False]])  # the last of three that are alike


@pytest.mark.parametrize("gradient", [False, True])
def test_the_program_never_holds_all_logits(gradient):
    head, targets, weights = layer(np.random.default_rng(0), 4, 64, 8, 1000, bias=False)

    def compiled(function, **options):
        def loss(hidden, kernel):
            return function(Unembedding(hidden, kernel), targets, weights, **options).loss

        return jax.jit(jax.grad(loss, argnums=(0, 1)) if gradient else loss).lower(head.hidden, head.kernel).compile()

    whole = compiled(linear_cross_entropy_reference)
    ours = compiled(linear_cross_entropy, chunk_logits=16 * 1000)
    all_logits = 4 * targets.size * 1000
    assert whole.memory_analysis().temp_size_in_bytes >= all_logits
    assert ours.memory_analysis().temp_size_in_bytes <= all_logits / 4
    assert "f32[4,64,1000]" in whole.as_text() and "f32[4,64,1000]" not in ours.as_text()


def test_a_chunk_is_never_all_of_a_large_batch(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_LOGITS", 4 * 8 * 100)
    assert chunks.Chunks.of(4, 8, 100, limit=10**6).count == 1
    assert chunks.Chunks.of(4, 8, 101, limit=10**6).count == 2


def test_a_frozen_kernel_gets_no_gradient_and_no_work():
    head, targets, weights = layer(np.random.default_rng(0), 2, 8, 16, 64, bias=False)

    def gradient(names):
        def loss(trained):
            return linear_cross_entropy(head.replace(**trained), targets, weights, chunk_logits=64).loss

        trained = {name: getattr(head, name) for name in names}
        return trained, jax.jit(jax.grad(loss)).lower(trained).as_text().count("stablehlo.dot_general")

    found, products = gradient(["hidden"])
    assert products == 2  # logits, and the hidden states' gradient
    assert gradient(["hidden", "kernel"])[1] == 3
    both = with_gradients(linear_cross_entropy, head, targets, weights)[1]
    alone = jax.grad(lambda x: linear_cross_entropy(head.replace(hidden=x), targets, weights).loss)(found["hidden"])
    np.testing.assert_allclose(alone, both[0], rtol=1e-6)


MESHES = [
    {"data": 8},
    {"fsdp": 4, "tensor": 2},
    {"fsdp": 2, "sequence": 2, "tensor": 2},
    {"data": 2, "sequence": 4},
    {"expert": 2, "stage": 4},
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("vocab", [64, 67])  # the second divides over nothing
def test_any_mesh_gives_the_same_and_sums_the_kernels_gradient_once(sizes, vocab):
    head, targets, weights = layer(np.random.default_rng(0), 16, 24, 8, vocab, bias=False)
    layout = Layout.of(Mesh(**({"data": 1} | sizes)), jax.devices())

    def loss(hidden, kernel, function, **options):
        hidden, kernel = constrain(hidden, "batch", "length", None), constrain(kernel, "vocab", None)
        return function(Unembedding(hidden, kernel), targets, weights, **options).loss

    expected = jax.value_and_grad(loss, argnums=(0, 1))(head.hidden, head.kernel, linear_cross_entropy_reference)
    sent = []
    with use_layout(layout):
        rows = NamedSharding(layout.mesh, as_spec(layout.activation_axes(("batch", "length", None), head.hidden.shape)))
        parts = NamedSharding(layout.mesh, as_spec(layout.param_axes(("vocab", "embed"), head.kernel.shape)))
        placed = jax.device_put(head.hidden, rows), jax.device_put(head.kernel, parts)
        for function, options in (
            (linear_cross_entropy_reference, {}),
            (linear_cross_entropy, {"chunk_logits": 200, "sparse": True}),
        ):
            step = functools.partial(loss, function=function, **options)
            gradient = jax.jit(jax.value_and_grad(step, argnums=(0, 1)), out_shardings=(None, (rows, parts)))
            compiled = gradient.lower(*placed).compile()
            found = compiled(*placed)
            sent.append(sum(one.sent for one in find_collectives(compiled.as_text(), layout.mesh)))
            for ours, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)
    assert sent[1] <= 1.5 * sent[0]  # with a sum a chunk it would be several times as much
