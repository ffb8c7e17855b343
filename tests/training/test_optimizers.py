import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmx.config import Optimizer
from lmx.errors import ConfigError
from lmx.training import optimizers
from lmx.training.state import TrainState

RULES = ("adamw", "adafactor", "lamb", "lion", "muon", "schedule_free_adamw", "sgd")
LAYERS, PERIOD = 4, 2
EMBED, HEADS, HEAD_DIM, MLP, EXPERTS = 8, 2, 4, 12, 3


def block(rng: np.random.Generator, *, sparse: bool) -> dict:
    def kernel(*shape):
        return {"kernel": rng.normal(size=shape).astype(np.float32) * 0.3}

    expert = (EXPERTS,) if sparse else ()
    mlp = {"in": kernel(*expert, EMBED, MLP), "out": kernel(*expert, MLP, EMBED)}
    attention = {"query": kernel(EMBED, HEADS, HEAD_DIM), "out": kernel(HEADS, HEAD_DIM, EMBED)}
    attention["query"]["bias"] = rng.normal(size=(HEADS, HEAD_DIM)).astype(np.float32)
    scale = rng.normal(size=EMBED).astype(np.float32)
    feed_forward = {"experts": {"router": kernel(EMBED, EXPERTS), **mlp}} if sparse else {"mlp": mlp}
    return {"attention": attention, "attention_norm": {"scale": scale}, **feed_forward}


def unrolled_params(seed: int = 0, stacks: tuple[str, ...] = ("decoder",)) -> dict:
    """Layers alternate dense and sparse, and each is ten times the one below, so that mixing them up shows."""
    rng = np.random.default_rng(seed)
    params = {"embeddings": {"tokens": {"table": rng.normal(size=(11, EMBED)).astype(np.float32)}}}
    for stack in stacks:
        layers = {f"layers_{i}": block(rng, sparse=i % PERIOD == 1) for i in range(LAYERS)}
        layers = {
            name: jax.tree.map(lambda x, i=i: x * 10.0**i, layer) for i, (name, layer) in enumerate(layers.items())
        }
        table = rng.normal(size=(HEADS, 6)).astype(np.float32)
        params[stack] = layers | {
            "final_norm": {"scale": np.ones(EMBED, np.float32)},
            "relative_bias": {"table": table},
        }
    params["heads"] = {
        "lm": {"kernel": rng.normal(size=(EMBED, 11)).astype(np.float32), "bias": np.ones(11, np.float32)}
    }
    return params


def scan_params(unrolled: dict) -> dict:
    """The same parameters as the scanned model holds them: block_j of group i is layer i * PERIOD + j."""
    scanned = dict(unrolled)
    for stack in {"encoder", "decoder"} & set(unrolled):
        rest = {name: value for name, value in unrolled[stack].items() if not name.startswith("layers_")}
        layers = [unrolled[stack][f"layers_{i}"] for i in range(LAYERS)]
        blocks = {f"block_{j}": jax.tree.map(lambda *x: np.stack(x), *layers[j::PERIOD]) for j in range(PERIOD)}
        scanned[stack] = rest | {"layers": blocks}
    return scanned


def train(options: Optimizer, params: dict, gradients: list[dict]) -> TrainState:
    transform = optimizers.make_optimizer(options, 100, params)
    opt_state = jax.jit(transform.init)(params)

    @jax.jit
    def step(params, opt_state, gradient):
        updates, opt_state = transform.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for gradient in gradients:
        params, opt_state = step(params, opt_state, gradient)
    return TrainState(step=jnp.int32(len(gradients)), params=params, opt_state=opt_state)


def options(name: str = "adamw", **changes) -> Optimizer:
    base = Optimizer(name=name, learning_rate=0.1, schedule="constant", warmup_steps=0, clip_norm=0.0)
    return dataclasses.replace(base, **changes)


def paths(tree) -> dict:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }


def assert_same(actual, expected, tolerance=2e-5):
    actual, expected = paths(actual), paths(expected)
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # update 1, 2, 4 (the peak: warmup_steps), 12 (half of what is left), 20 (the end), 25
        ("constant", [0.25, 0.5, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 1, 0.6, 0.2, 0.2]),
        ("cosine", [0.25, 0.5, 1, 0.6, 0.2, 0.2]),
        ("inverse_sqrt", [0.25, 0.5, 1, (4 / 12) ** 0.5, (4 / 20) ** 0.5, (4 / 25) ** 0.5]),
        ("wsd", [0.25, 0.5, 1, 1, 0.2, 0.2]),
    ],
)
def test_schedule_by_hand(schedule, expected):
    rate = optimizers.make_schedule(
        Optimizer(schedule=schedule, learning_rate=3.0, warmup_steps=4, end_fraction=0.2, decay_fraction=0.25), steps=20
    )
    np.testing.assert_allclose([rate(n - 1) for n in (1, 2, 4, 12, 20, 25)], 3 * np.array(expected), rtol=1e-6)


def test_schedules_between_their_corners():
    common = {"learning_rate": 1.0, "warmup_steps": 0, "end_fraction": 0.0, "decay_steps": 20}
    wsd = optimizers.make_schedule(Optimizer(schedule="wsd", decay_fraction=0.5, **common), steps=999)
    cosine = optimizers.make_schedule(Optimizer(schedule="cosine", **common), steps=999)
    np.testing.assert_allclose([wsd(n - 1) for n in (1, 10, 15, 20)], [1, 1, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose([cosine(n - 1) for n in (5, 15)], [(1 + 0.5**0.5) / 2, (1 - 0.5**0.5) / 2], rtol=1e-5)


def test_adamw_against_numpy():
    params, gradients = unrolled_params(), [unrolled_params(seed) for seed in (1, 2, 3)]
    config = options(b1=0.8, b2=0.9, epsilon=1e-3, weight_decay=0.5, clip_norm=1.0)
    actual = paths(train(config, params, gradients).params)
    expected = paths(params)
    first, second = ({name: np.zeros_like(p) for name, p in expected.items()} for _ in range(2))
    for n, gradient in enumerate(gradients, start=1):
        norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradient)))
        for name, g in paths(gradient).items():
            g = g / max(norm, 1.0)
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            move = first[name] / (1 - 0.8**n) / (np.sqrt(second[name] / (1 - 0.9**n)) + 1e-3)
            decayed = name.endswith("kernel") or name == "embeddings/tokens/table"
            expected[name] = expected[name] - 0.1 * (move + 0.5 * decayed * expected[name])
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("rule", RULES)
def test_scanned_moves_as_unrolled(rule):
    params, gradients = unrolled_params(), [unrolled_params(seed) for seed in (1, 2)]
    config = options(rule, layer_decay=0.5, ema_decay=0.0 if rule == "schedule_free_adamw" else 0.9)
    unrolled = train(config, params, gradients)
    scanned = train(config, scan_params(params), [scan_params(g) for g in gradients])
    assert_same(scanned.params, scan_params(jax.device_get(unrolled.params)))
    assert_same(optimizers.eval_params(scanned), scan_params(jax.device_get(optimizers.eval_params(unrolled))))
    moved = paths(jax.tree.map(lambda new, old: np.abs(new - old).max() > 0, unrolled.params, params))
    assert all(moved.values()), [name for name in moved if not moved[name]]


def test_adafactor_factors_each_layer_by_itself():
    """Factored statistics, which the tiny shapes above are too small for, with more layers than features."""
    rule = optimizers.per_layer(optax.scale_by_factored_rms(min_dim_size_to_factor=4))
    layers = [np.random.default_rng(i).normal(size=(5, 6)).astype(np.float32) * 10.0**i for i in range(7)]
    stacked = {"decoder": {"layers": {"kernel": np.stack(layers)}}}
    updates, state = rule.update(stacked, rule.init(stacked), stacked)
    assert jax.tree.leaves(state)[1].shape == (7, 5)
    for i, layer in enumerate(layers):
        rows, columns = (np.mean(layer**2, axis, keepdims=True) for axis in (1, 0))
        expected = layer / np.sqrt(rows * columns / rows.mean())
        np.testing.assert_allclose(updates["decoder"]["layers"]["kernel"][i], expected, rtol=1e-4)


def test_muon_orthogonalizes_each_matrix():
    params = scan_params(unrolled_params())
    config = options("muon", learning_rate=1.0, weight_decay=0.0)
    moved = jax.tree.map(
        lambda new, old: old - new, train(config, params, [scan_params(unrolled_params(1))]).params, params
    )
    block_0, block_1 = (moved["decoder"]["layers"][f"block_{j}"] for j in range(2))
    matrices = {
        "query": block_0["attention"]["query"]["kernel"].reshape(-1, EMBED, HEADS * HEAD_DIM),
        "out": block_0["attention"]["out"]["kernel"].reshape(-1, HEADS * HEAD_DIM, EMBED),
        "mlp": block_0["mlp"]["in"]["kernel"],
        "experts": block_1["experts"]["out"]["kernel"].reshape(-1, MLP, EMBED),
    }
    for name, stack in matrices.items():
        scale = 0.2 * np.sqrt(max(stack.shape[1:]))
        values = np.linalg.svd(np.asarray(stack) / scale, compute_uv=False)
        assert (values > 0.5).all() and (values < 1.3).all(), (name, values)
    for path in ("embeddings/tokens/table", "heads/lm/kernel", "decoder/layers/block_1/experts/router/kernel"):
        np.testing.assert_allclose(np.abs(paths(moved)[path]), 1, rtol=1e-3, err_msg=path)  # Adam's first step


def test_lamb_trust_ratio():
    params, gradient = unrolled_params(), unrolled_params(1)
    config = options("lamb", weight_decay=0.0)
    moved = jax.tree.map(lambda new, old: new - old, train(config, params, [gradient]).params, params)
    for name, old in paths(params).items():  # Adam's first step is a sign; matrices move by 0.1 of their norm
        kernel = name.endswith("kernel") or name == "embeddings/tokens/table"
        expected = 0.1 * (np.linalg.norm(old) if kernel else np.sqrt(old.size))
        np.testing.assert_allclose(np.linalg.norm(paths(moved)[name]), expected, rtol=2e-3, err_msg=name)


def test_layer_decay_by_distance_from_the_head():
    params = scan_params(unrolled_params(0, ("encoder", "decoder")))
    config = options("sgd", b1=0.0, weight_decay=0.0, layer_decay=0.5)
    ones = jax.tree.map(np.ones_like, params)
    moved = paths(jax.tree.map(lambda new, old: (old - new) / 0.1, train(config, params, [ones]).params, params))
    powers = {
        "heads/lm/kernel": 0,
        "decoder/final_norm/scale": 0,
        "decoder/layers/block_1/attention_norm/scale": [3, 1],  # layers 1 and 3 of 4
        "decoder/layers/block_0/attention_norm/scale": [4, 2],
        "encoder/final_norm/scale": 4,
        "encoder/layers/block_0/attention/out/kernel": [8, 6],
        "embeddings/tokens/table": 9,
    }
    for name, power in powers.items():
        value = np.asarray(moved[name])
        expected = np.broadcast_to(0.5 ** np.reshape(power, (-1,) + (1,) * (value.ndim - 1)), value.shape)
        np.testing.assert_allclose(value, expected, atol=5e-4, err_msg=name)  # the largest weights are 1000s


@pytest.mark.parametrize("rule", RULES)
def test_freeze_body_trains_heads_and_stores_nothing_else(rule):
    params = unrolled_params()
    config = options(rule, freeze_body=True, clip_norm=1.0, ema_decay=0.0 if rule == "schedule_free_adamw" else 0.9)
    state = train(config, params, [unrolled_params(1)])
    for name, value in paths(params).items():
        assert np.array_equal(value, paths(state.params)[name]) != name.startswith("heads"), name
        assert np.array_equal(value, paths(optimizers.eval_params(state))[name]) != name.startswith("heads"), name
    heads = sum(x.size for x in jax.tree.leaves(params["heads"]))
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) <= 3 * heads + 10


def test_average_is_the_mean_over_updates():
    params, gradients = unrolled_params(), [unrolled_params(seed) for seed in (1, 2)]
    config = options("sgd", b1=0.0, ema_decay=0.15)
    mean, rates = params, [1 - 1 / 10, 1 - 0.15]  # min(decay, (1 + n) / (10 + n)) for n = 0, 1: 0.1, 0.15
    for n, rate in enumerate(rates, start=1):
        moved = train(config, params, gradients[:n]).params
        mean = jax.tree.map(lambda old, new, rate=rate: old + rate * (new - old), mean, moved)
    assert_same(optimizers.eval_params(train(config, params, gradients)), mean)


def test_schedule_free_evaluates_the_average_of_z():
    """With a constant learning rate x is the plain mean of z_1 … z_n (Defazio et al. 2024, equation 5)."""
    config = options("schedule_free_adamw", weight_decay=0.0)
    params = {"heads": {"lm": {"kernel": np.ones((2, 2), np.float32)}}}
    gradient = jax.tree.map(np.ones_like, params)  # z moves by the learning rate, 0.1, each step
    state = train(config, params, [gradient] * 3)
    np.testing.assert_allclose(
        optimizers.eval_params(state)["heads"]["lm"]["kernel"], np.mean([0.9, 0.8, 0.7]), rtol=1e-5
    )
    np.testing.assert_allclose(state.params["heads"]["lm"]["kernel"], 0.9 * 0.8 + 0.1 * 0.7, rtol=1e-5)


def test_eval_params_are_the_parameters_where_nothing_is_averaged():
    state = train(options(), unrolled_params(), [])
    assert optimizers.eval_params(state) is state.params


def test_bad_combinations():
    params = unrolled_params()
    with pytest.raises(ConfigError, match="averages the parameters"):
        optimizers.make_optimizer(options("schedule_free_adamw", ema_decay=0.9), 10, params)
    with pytest.raises(ConfigError, match="no parameters of their own"):
        optimizers.make_optimizer(options(freeze_body=True), 10, params | {"heads": {}})
