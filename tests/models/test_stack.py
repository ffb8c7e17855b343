"""Scanned and unrolled stacks are one model; rematerialization changes what is kept and nothing else."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.config import Experts, layer_period
from lmx.models import stack
from lmx.models.stack import stack_params, unroll_params
from lmx.models.transformer import Transformer
from tests.models.reference import build, example, randomized, small

PATTERNS = {
    "decoder": small("decoder", num_layers=3),
    "encoder": small("encoder", heads=("mlm", "classification"), num_layers=2, num_token_types=2),
    "encoder_decoder": small("encoder_decoder", num_layers=2, num_decoder_layers=4, position="relative"),
    "windows": small("decoder", num_layers=4, attention_windows=(0, 2)),
    "experts": small("decoder", num_layers=4, experts=Experts(num_experts=3, every=2, jitter=0.0)),
    "experts and windows": small(
        "decoder",
        num_layers=6,
        attention_windows=(0, 2, 3),
        experts=Experts(num_experts=2, every=2, z_loss_weight=0.1, jitter=0.0),
    ),
}


def loss(params, model, batch):
    """A scalar that every output and every expert's loss has a part in."""
    outputs, sown = model.apply({"params": params}, batch, mutable=["experts"])
    total = sum((value**2).mean() for value in outputs.values())
    for path, value in jax.tree_util.tree_leaves_with_path(sown):
        total += value.sum() * (path[-1].key != "dropped")
    return total


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "experts" in name else []) for name in PATTERNS]
)
def test_scanned_equals_unrolled_in_value_and_gradient(name):
    config, batch = PATTERNS[name], example(PATTERNS[name])
    unrolled, params = build(config)
    scanned = Transformer(dataclasses.replace(config, scan_layers=True))
    stacked = stack_params(params, layer_period(config))
    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain = value_and_grad(params, unrolled, batch)
    value, gradients = value_and_grad(stacked, scanned, batch)
    np.testing.assert_allclose(value, plain[0], rtol=1e-5)
    assert jax.tree.structure(gradients) != jax.tree.structure(plain[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), unroll_params(gradients), plain[1])


@pytest.mark.parametrize("name", PATTERNS)
def test_stack_and_unroll_are_inverse_and_have_the_shapes_of_init(name):
    config, batch = PATTERNS[name], example(PATTERNS[name])
    _, params = build(config)
    stacked = stack_params(params, layer_period(config))
    scanned = Transformer(dataclasses.replace(config, scan_layers=True))
    shapes = nn.meta.unbox(jax.eval_shape(scanned.init, jax.random.key(0), batch)["params"])
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(jnp.shape, stacked)
    back = unroll_params(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_order_of_layers_survives_more_than_ten():
    config = small(num_layers=12, embed_dim=2, num_heads=1, mlp_dim=2)
    _, params = build(config)
    stacked = stack_params(params, 1)["decoder"]["layers"]["block_0"]["mlp"]["in"]["kernel"]
    for index in range(12):
        np.testing.assert_array_equal(stacked[index], params["decoder"][f"layers_{index}"]["mlp"]["in"]["kernel"])


def test_scanned_layers_start_from_different_values():
    config = small(num_layers=2, scan_layers=True)
    params = nn.meta.unbox(Transformer(config).init(jax.random.key(0), example(config))["params"])
    kernel = params["decoder"]["layers"]["block_0"]["mlp"]["in"]["kernel"]
    assert kernel.shape == (2, 8, 12) and not np.allclose(kernel[0], kernel[1])


def primitives(jaxpr, name: str) -> int:
    """How often a primitive stands in a jaxpr and all jaxprs inside it."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == name
        for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                count += primitives(inner, name)
    return count


def backward(remat: str, scan_layers: bool):
    config = small(num_layers=2, scan_layers=scan_layers, remat=remat)
    batch = example(config)
    model = Transformer(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    params = randomized(nn.meta.unbox(shapes))
    return jax.grad(loss), (params, model, batch)


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("remat", ["full", "dots", "dots_no_batch"])
def test_remat_leaves_gradients_alone(remat, scan_layers):
    gradient, arguments = backward(remat, scan_layers)
    plain, plain_arguments = backward("none", scan_layers)
    found, expected = (jax.jit(f, static_argnums=1)(*a) for f, a in ((gradient, arguments), (plain, plain_arguments)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_remat_policies_recompute_what_they_say(scan_layers):
    """Matmuls and exponentials in the backward pass's program: more stand there where more is recomputed."""
    matmuls, exponentials = {}, {}
    for remat in ("none", "dots", "dots_no_batch", "full"):
        gradient, (params, model, batch) = backward(remat, scan_layers)
        jaxpr = jax.make_jaxpr(lambda p, f=gradient, m=model, b=batch: f(p, m, b))(params).jaxpr
        matmuls[remat], exponentials[remat] = primitives(jaxpr, "dot_general"), primitives(jaxpr, "exp")
    bodies = 1 if scan_layers else 2
    assert matmuls["dots"] == matmuls["none"]
    assert matmuls["dots_no_batch"] == matmuls["none"] + 2 * bodies  # Q K^T and weights V
    assert (
        matmuls["full"] == matmuls["none"] + 7 * bodies
    )  # and query, key, value, out, in (out's result is not needed)
    assert exponentials["none"] < exponentials["dots"] == exponentials["full"]


def test_full_remat_saves_less_between_forward_and_backward():
    saved = {}
    for remat in ("none", "dots", "full"):
        _, (params, model, batch) = backward(remat, True)
        _, pullback = jax.vjp(lambda p, m=model, b=batch: loss(p, m, b), params)
        saved[remat] = sum(leaf.size for leaf in jax.tree.leaves(pullback))
    assert saved["full"] < saved["dots"] < saved["none"]


@pytest.mark.parametrize("name", ["experts", pytest.param("encoder_decoder", marks=pytest.mark.slow)])
def test_a_loop_that_is_written_out_has_the_same_parameters_and_gradients(name, monkeypatch):
    model, params = build(dataclasses.replace(PATTERNS[name], scan_layers=True))
    params = randomized(params)
    batch = example(PATTERNS[name])

    def gradient():
        return jax.jit(jax.grad(lambda p: loss(p, model, batch)))  # another function each time: nothing is remembered

    looped, written = gradient(), gradient()
    assert "stablehlo.while" in looped.lower(params).as_text()
    expected = looped(params)
    monkeypatch.setattr(stack, "MOST_UNROLLED", 16)
    jax.clear_caches()
    assert "stablehlo.while" not in written.lower(params).as_text()
    found = written(params)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
