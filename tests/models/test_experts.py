"""The Switch layer against the paper's equations in plain loops."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.config import Experts, Mesh
from lmx.models import experts
from lmx.models.experts import SwitchFeedForward, expert_form, route
from lmx.models.feed_forward import FeedForward
from lmx.parallel.sharding import Layout, use_layout
from tests.models.reference import randomized, small, softmax

BATCH, LENGTH, EXPERTS, EMBED = 3, 10, 4, 8
SEGMENTS = np.array([[1] * 10, [1] * 4 + [2] * 3 + [0] * 3, [0] * 10])


def router_logits(seed=0):
    return np.random.default_rng(seed).standard_normal((BATCH, LENGTH, EXPERTS)).astype(np.float32) * 2


def test_losses_are_the_papers_equations():
    logits = router_logits()
    found = route(jnp.asarray(logits), jnp.asarray(SEGMENTS), capacity=3)
    for row in range(2):
        places = [t for t in range(LENGTH) if SEGMENTS[row, t] > 0]
        tokens = len(places)
        f = [sum(np.argmax(logits[row, t]) == i for t in places) / tokens for i in range(EXPERTS)]  # equation 5
        p = [sum(softmax(logits[row, t])[i] for t in places) / tokens for i in range(EXPERTS)]  # equation 6
        balance = EXPERTS * sum(f[i] * p[i] for i in range(EXPERTS))  # equation 4 without alpha
        z = sum(np.log(sum(np.exp(logits[row, t, i]) for i in range(EXPERTS))) ** 2 for t in places) / tokens
        np.testing.assert_allclose(found.load_balance[row], balance, rtol=1e-5)
        np.testing.assert_allclose(found.router_z[row], z, rtol=1e-5)
    for name in ("load_balance", "router_z", "dropped"):  # a row of padding has no part in any mean
        assert getattr(found, name)[2] == 0.0


def test_dispatch_is_first_come_first_served_and_padding_goes_nowhere():
    logits, capacity = router_logits(), 2
    found = route(jnp.asarray(logits), jnp.asarray(SEGMENTS), capacity)
    for row in range(BATCH):
        filled, dropped, real = [0] * EXPERTS, 0, 0
        for t in range(LENGTH):
            slots = np.full(EXPERTS, -1)
            if SEGMENTS[row, t] > 0:
                real += 1
                expert = int(np.argmax(logits[row, t]))
                if filled[expert] < capacity:
                    slots[expert] = filled[expert]
                    filled[expert] += 1
                else:
                    dropped += 1
            np.testing.assert_array_equal(found.slots[row, t], slots)
            gate = softmax(logits[row, t]).max()
            np.testing.assert_allclose(found.gates[row, t], (slots >= 0) * gate, rtol=1e-5)
        np.testing.assert_allclose(found.dropped[row], dropped / max(real, 1), atol=1e-6)
    assert found.dropped[0] > 0


def test_second_choices_come_after_all_first_ones():
    order = np.array([[[3.0, 2, 1, 0], [0, 3, 2, 1], [3, 2, 0, 1]]])  # choices: 0 and 1, 1 and 2, 0 and 1
    found = route(jnp.asarray(order), jnp.ones((1, 3), jnp.int32), capacity=2, top_k=2, normalize=True)
    np.testing.assert_array_equal(found.slots[0], [[0, 1, -1, -1], [-1, 0, 0, -1], [1, -1, -1, -1]])
    first = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(
        found.gates[0], [[first, 1 - first, 0, 0], [0, first, 1 - first, 0], [first, 0, 0, 0]], rtol=1e-6
    )
    np.testing.assert_allclose(found.dropped, 1 / 6, rtol=1e-6)


def test_without_a_limit_nothing_is_dropped_and_the_result_is_that_of_ample_room():
    module, params, x, segments = layer(experts={"top_k": 2, "capacity": LENGTH})
    ample = module.apply(params, x, segments)
    module, *_ = layer(experts={"top_k": 2, "eval_capacity_factor": 0.0})
    found, state = module.apply(params, x, segments, mutable=["experts"])
    np.testing.assert_allclose(found, ample, atol=1e-6)
    np.testing.assert_array_equal(state["experts"]["dropped"], 0.0)
    assert np.abs(np.asarray(found)).max() > 1e-3


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_products_in_groups_are_those_of_every_expert(activation, monkeypatch):
    module, params, x, segments = layer(activation=activation, experts={"top_k": 2, "eval_capacity_factor": 0.0})

    def found(params, x):
        return (module.apply(params, x, segments) ** 2).sum()

    every = jax.value_and_grad(found, argnums=(0, 1))(params, x)
    quantized = quantize_kernels(module, params, x, segments)
    rounded = module.apply(quantized, x, segments)
    monkeypatch.setattr(experts, "current_platform", lambda: "gpu")
    assert "ragged_dot" in str(jax.make_jaxpr(found)(params, x))
    groups = jax.value_and_grad(found, argnums=(0, 1))(params, x)
    for a, b in zip(jax.tree.leaves(groups), jax.tree.leaves(every), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(module.apply(quantized, x, segments), rounded, rtol=1e-4, atol=1e-5)


def test_the_form_of_experts_is_told_with_the_reason(monkeypatch):
    def told(factor=0.0, **model):
        config = layer(experts={"capacity_factor": factor})[0].config
        return str(expert_form(dataclasses.replace(config, **model)))

    assert told(1.25) == "through as many slots of each expert as its capacity"
    assert told() == (
        "every expert computes every token (for products in groups a cpu goes through all groups for all rows)"
    )
    monkeypatch.setattr(experts, "current_platform", lambda: "gpu")
    assert told() == "sorted by expert and multiplied in groups"
    assert told(products="int8").endswith("(model.products='int8' has no products in groups)")
    with use_layout(Layout.of(Mesh(data=2), jax.devices()[:2])):
        assert told().endswith("(no group is split over 2 devices)")


def quantize_kernels(module, params, x, segments):
    """The experts' kernels in eight bits."""
    found = module.apply(params, x, segments, mutable=["quantized"])[1]["quantized"]
    names = [name for name in found if name != "router"]
    return {"params": params["params"] | {name: params["params"][name] | found[name] for name in names}}


def test_perfect_balance_costs_one():
    logits = 50.0 * np.eye(EXPERTS, dtype=np.float32)[None].repeat(2, 1)
    found = route(jnp.asarray(logits), jnp.ones((1, 8), jnp.int32), capacity=2)
    np.testing.assert_allclose(found.load_balance, 1.0, rtol=1e-6)
    np.testing.assert_array_equal(found.dropped, 0.0)
    piled = route(jnp.full((1, 8, EXPERTS), 0.0).at[..., 1].set(50.0), jnp.ones((1, 8), jnp.int32), capacity=2)
    np.testing.assert_allclose(piled.load_balance, EXPERTS, rtol=1e-6)
    np.testing.assert_allclose(piled.dropped, 6 / 8, rtol=1e-6)


@pytest.mark.parametrize(
    "length, experts, factor, slots",
    [
        (512, 8, 1.0, 64),
        (512, 8, 1.25, 80),
        (10, 4, 1.0, 3),  # 2.5, rounded up
        (100, 10, 1.1, 11),  # 100 / 10 * 1.1 is 11.000000000000002 in floating point
        (4, 64, 1.0, 1),  # never none
        (6, 2, 9.0, 6),  # never more than there are tokens
    ],
)
def test_capacity_is_equation_3(length, experts, factor, slots):
    assert Experts(num_experts=experts, capacity_factor=factor).slots(length, train=True) == slots


def layer(train_factor=8.0, eval_factor=8.0, seed=0, **fields):
    experts = fields.pop("experts", {})
    settings = {"num_experts": EXPERTS, "capacity_factor": train_factor, "eval_capacity_factor": eval_factor}
    config = small(experts=Experts(**{**settings, **experts}), **fields)
    module = SwitchFeedForward(config)
    x = jnp.asarray(np.random.default_rng(seed).standard_normal((BATCH, LENGTH, EMBED)), jnp.float32)
    segments = jnp.asarray(SEGMENTS).at[2].set(1)
    variables = jax.eval_shape(module.init, jax.random.key(0), x, segments)
    params = {"params": randomized(nn.meta.unbox(variables["params"]), seed)}
    return module, params, x, segments


def test_layer_sends_each_token_through_its_expert_times_its_gate():
    module, params, x, segments = layer(activation="relu")
    found = module.apply(params, x, segments)
    p = jax.tree.map(np.asarray, params["params"])
    for row in range(BATCH):
        for t in range(LENGTH):
            probabilities = softmax(np.asarray(x[row, t]) @ p["router"]["kernel"])
            expert = int(probabilities.argmax())
            hidden = np.maximum(x[row, t] @ p["in"]["kernel"][expert] + p["in"]["bias"][expert], 0)
            out = (hidden @ p["out"]["kernel"][expert] + p["out"]["bias"][expert]) * probabilities[expert]
            np.testing.assert_allclose(found[row, t], out if segments[row, t] > 0 else np.zeros(EMBED), atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_one_expert_is_the_dense_layer(activation):
    module, params, x, _ = layer(activation=activation, experts={"num_experts": 1})
    dense = FeedForward(module.config)
    ones = jnp.ones((BATCH, LENGTH), jnp.int32)
    twin = {name: jax.tree.map(lambda leaf: leaf[0], p) for name, p in params["params"].items() if name != "router"}
    np.testing.assert_allclose(module.apply(params, x, ones), dense.apply({"params": twin}, x), atol=1e-5)


def test_dropped_tokens_get_exactly_zero():
    module, params, x, segments = layer(eval_factor=0.5)
    found, state = module.apply(params, x, segments, mutable=["experts", "intermediates"])
    kept = np.asarray(state["intermediates"]["gates"][0]).sum(-1) > 0
    assert kept.any() and not kept[np.asarray(segments) > 0].all()
    np.testing.assert_array_equal(np.asarray(found)[~kept], 0.0)
    assert (np.abs(np.asarray(found)[kept]).max(-1) > 1e-3).all()


def test_training_and_evaluation_have_capacities_of_their_own():
    module, params, x, segments = layer(train_factor=0.4, eval_factor=8.0, experts={"jitter": 0.0})
    dropped = {
        train: module.apply(params, x, segments, train, mutable=["experts"])[1]["experts"]["dropped"].sum()
        for train in (True, False)
    }
    assert dropped[False] == 0.0 < dropped[True]


def test_jitter_acts_only_in_training():
    module, params, x, segments = layer(experts={"jitter": 0.3})

    def dispatch(train, seed):
        rngs = {"jitter": jax.random.key(seed)}
        state = module.apply(params, x, segments, train, rngs=rngs, mutable=["experts"])[1]
        return np.asarray(state["experts"]["router_z"] + state["experts"]["load_balance"])

    assert not np.array_equal(dispatch(True, 0), dispatch(True, 1))
    np.testing.assert_array_equal(dispatch(False, 0), dispatch(False, 1))


def test_router_is_float32_under_bfloat16():
    losses = {}
    for dtype in ("float32", "bfloat16"):
        module, params, x, segments = layer(dtype=dtype, experts={"z_loss_weight": 1.0})
        output, state = module.apply(params, x, segments, mutable=["experts"])
        assert output.dtype == dtype
        losses[dtype] = state["experts"]["router_z"]
        assert losses[dtype].dtype == jnp.float32
    np.testing.assert_array_equal(losses["bfloat16"], losses["float32"])


def test_rows_do_not_depend_on_their_neighbours():
    module, params, x, segments = layer(eval_factor=1.0)
    together, sown = module.apply(params, x, segments, mutable=["experts"])
    for row in range(BATCH):
        alone, one = module.apply(params, x[row : row + 1], segments[row : row + 1], mutable=["experts"])
        np.testing.assert_allclose(together[row : row + 1], alone, atol=1e-6)
        for name, values in sown["experts"].items():
            assert values.shape == (BATCH,)
            np.testing.assert_allclose(values[row : row + 1], one["experts"][name], rtol=1e-5)


def test_weights_of_the_losses_are_applied_and_reach_the_router():
    weights = {"load_balance_weight": 0.5, "z_loss_weight": 0.25}
    module, params, x, segments = layer(experts=weights)
    plain, plain_params, _, _ = layer(experts={"load_balance_weight": 1.0, "z_loss_weight": 1.0})

    def sown(module, params):
        return module.apply(params, x, segments, mutable=["experts"])[1]["experts"]

    weighted, unweighted = sown(module, params), sown(plain, plain_params)
    np.testing.assert_allclose(weighted["load_balance"], 0.5 * unweighted["load_balance"], rtol=1e-6)
    np.testing.assert_allclose(weighted["router_z"], 0.25 * unweighted["router_z"], rtol=1e-6)
    for name in ("load_balance", "router_z"):
        gradient = jax.grad(lambda p, n=name: sown(module, p)[n].sum())(params)["params"]
        assert np.abs(gradient["router"]["kernel"]).max() > 1e-4
        assert np.abs(gradient["in"]["kernel"]).max() == 0.0


def test_gate_carries_gradient_to_the_router():
    module, params, x, segments = layer()
    gradient = jax.grad(lambda p: (module.apply(p, x, segments) ** 2).sum())(params)["params"]
    assert np.abs(gradient["router"]["kernel"]).max() > 1e-4
