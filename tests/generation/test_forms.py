"""The form that a CPU generates with: the same model, other arrays."""

import jax
import numpy as np
import pytest

from lmx.config import Lora
from lmx.generation import forms
from lmx.generation.decode import prefill
from lmx.generation.forms import for_decoding, quantize_params
from lmx.generation.generate import generate, pad_prompts
from lmx.kernels.products import Turned
from lmx.models.heads import num_params
from tests.generation.test_decode import PROMPTS, make
from tests.generation.test_int8 import KINDS

LORA = {"lora": Lora(rank=2, targets=("query", "in", "output")), "tie_embeddings": False}


def turned(params):
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Turned))
    return [leaf for leaf in leaves if isinstance(leaf, Turned)]


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_same_model(kind, eight_bits):
    model, params = make(**KINDS[kind])
    params = quantize_params(model, params) if eight_bits else params
    other, form = for_decoding(model, params)
    assert not other.config.scan_layers and num_params(form) == num_params(params)
    assert len(turned(form)) >= 2 * 4  # attention of both layers

    tokens, segments = pad_prompts(PROMPTS, 8, 0, left=kind != "encoder_decoder")
    expected, found = (prefill(m, p, tokens, segments, new_slots=4)[0] for m, p in ((model, params), (other, form)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert generate(other, form, PROMPTS, max_new_tokens=4) == generate(model, params, PROMPTS, max_new_tokens=4)
    assert turned(params) == []


def test_what_an_adapter_is_added_to_is_turned_or_stays():
    model, params = make(**LORA)
    other, form = for_decoding(model, params)
    assert isinstance(form["decoder"]["layers_0"]["attention"]["query"]["kernel"], Turned)
    assert not isinstance(form["heads"]["lm"]["output"]["kernel"], Turned)  # becomes another with each adapter
    tokens, segments = pad_prompts(PROMPTS, 8, 0, left=True)
    expected, found = (prefill(m, p, tokens, segments, new_slots=4)[0] for m, p in ((model, params), (other, form)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reason", ["platform", "products", "devices", "memory"])
def test_it_is_left_out_where_it_does_not_help_or_fit(reason, monkeypatch):
    model, params = make(**{"products": {"products": "int8"}}.get(reason, {}))
    if reason == "platform":
        monkeypatch.setattr(forms.jax, "default_backend", lambda: "gpu")
    if reason == "memory":
        monkeypatch.setattr(forms, "available_memory", lambda: sum(x.nbytes for x in jax.tree.leaves(params)))
    if reason == "devices":
        everywhere = jax.sharding.NamedSharding(jax.make_mesh((2,), ("x",)), jax.sharding.PartitionSpec())
        params = jax.device_put(params, everywhere)
    other, form = for_decoding(model, params)
    assert other is model and form is params
