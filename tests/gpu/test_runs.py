"""Training, decoding and commands on a GPU against the same on the processor beside it."""

import jax
import numpy as np
import pytest

from lmx.config import Experts
from lmx.generation.generate import generate
from lmx.models import experts
from lmx.parallel.sharding import put_batch
from tests.end_to_end.conftest import QUICKSTART, lmx
from tests.generation.test_decode import PROMPTS, make
from tests.models.test_experts import layer
from tests.training.runs import make_batch, make_config, run
from tests.training.test_program import opened

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU")]
MODELS = {
    "decoder": {},
    "rotary decoder": {"position": "rotary", "num_kv_heads": 2, "activation": "swiglu", "norm": "rmsnorm"},
    "encoder": {},
    "encoder_decoder": {"position": "relative"},
    "switch encoder_decoder": {"experts": Experts(num_experts=4, every=2, first=1)},
}


def config_of(name, **model):
    return make_config(name.split()[-1], **MODELS[name] | model)


@pytest.mark.parametrize("name", MODELS)
def test_steps_in_float32_are_those_of_a_cpu(name):
    with jax.default_matmul_precision("highest"):
        (params, history), (expected, past) = (run(config_of(name), platform=of) for of in ("gpu", "cpu"))
    for one, other in zip(history, past, strict=True):
        np.testing.assert_allclose(*(float(of["loss"][0] / of["loss"][1]) for of in (one, other)), rtol=1e-4)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-3 * max(abs(other).max(), 1.0))


@pytest.mark.parametrize("name", MODELS)
def test_steps_in_bfloat16_by_the_fused_kernel_are_close(name):
    _, history = run(config_of(name, dtype="bfloat16", attention="flash"), platform="gpu")
    _, past = run(config_of(name), platform="cpu")
    for one, other in zip(history, past, strict=True):
        np.testing.assert_allclose(*(float(of["loss"][0] / of["loss"][1]) for of in (one, other)), rtol=2e-2)


def test_the_fused_kernel_is_in_the_program_and_the_state_is_given_away():
    config = config_of("decoder", dtype="bfloat16")
    _, step, state, layout = opened(config)
    batch = put_batch(make_batch(config), layout.mesh)
    compiled = step.lower(state, batch).compile()
    assert "__cudnn$fmhaSoftmaxBackward" in compiled.as_text()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= held
    for _ in range(3):
        state, _ = step(state, put_batch(make_batch(config), layout.mesh))
    assert step.function._cache_size() == 1


@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"int8_cache": True}], ids=str)
def test_likeliest_tokens_are_those_of_a_cpu(architecture, options):
    model, params = make(architecture)
    found = []
    for platform in ("gpu", "cpu"):
        with jax.default_device(jax.devices(platform)[0]), jax.default_matmul_precision("highest"):
            own = jax.device_put(params, jax.devices(platform)[0])
            found.append(generate(model, own, PROMPTS, max_new_tokens=8, **options))
    assert found[0] == found[1]


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_products_in_groups_are_those_of_every_expert(activation, monkeypatch):
    module, params, x, segments = layer(activation=activation, experts={"top_k": 2, "eval_capacity_factor": 0.0})

    def found(params, x):
        return (module.apply(params, x, segments) ** 2).sum()

    with jax.default_matmul_precision("highest"):
        groups = jax.jit(jax.value_and_grad(found, argnums=(0, 1)))(params, x)
        monkeypatch.setattr(experts, "expert_form", lambda *_: experts.ExpertForm("every"))
        every = jax.jit(jax.value_and_grad(found, argnums=(0, 1)))(params, x)
    for a, b in zip(jax.tree.leaves(groups), jax.tree.leaves(every), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_command_trains_profiles_and_generates(tmp_path):
    options = ["--config", QUICKSTART, "--workdir", tmp_path / "run"]
    done = lmx("train", *options, "--config.model.dtype=bfloat16", "--config.train.steps=20", "--profile")
    assert "cuDNN's fused kernel" in done.stdout and "ms a step" in done.stdout
    written = lmx("generate", "--workdir", tmp_path / "run", "--prompt", "The statement", "--max-new-tokens", 8)
    assert written.stdout.startswith("The statement")
