"""FLOPs counted from the config against XLA's own count of the compiled program."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lmx.config import Model
from lmx.models.flops import forward_flops
from lmx.models.transformer import Transformer

BASE = Model(  # relu, because XLA counts every operation inside a GELU
    vocab_size=512, num_layers=2, num_heads=4, embed_dim=128, mlp_dim=512, activation="relu", scan_layers=False
)
LENGTH, SOURCE = 64, 32


def compiled_flops(model):
    tokens = jnp.zeros((1, LENGTH), jnp.int32)
    batch = {"tokens": tokens, "decoder_tokens": tokens, "encoder_tokens": tokens[:, :SOURCE]}
    transformer = Transformer(model)
    variables = jax.eval_shape(transformer.init, jax.random.key(0), batch)
    head = "lm_logits" if "lm" in model.heads else "mlm_logits"
    forward = jax.jit(lambda v: transformer.apply(v, batch)[head]).lower(variables)
    return forward.compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "encoder"},
        {"architecture": "encoder", "num_kv_heads": 1, "activation": "swiglu"},
        {"architecture": "encoder_decoder", "num_decoder_layers": 3},
    ],
)
def test_bidirectional_stacks_agree_with_the_compiler(changes):
    model = dataclasses.replace(BASE, **changes)
    two = model.architecture == "encoder_decoder"
    counted = forward_flops(model, LENGTH, SOURCE if two else 0)
    if two:  # the program computes the causal half that is masked away, too
        counted += 4 * LENGTH * (LENGTH - (LENGTH + 1) / 2) * model.embed_dim * model.num_decoder_layers
    assert counted == pytest.approx(compiled_flops(model), rel=0.05)  # XLA counts norms and softmax as well


def test_a_causal_row_counts_the_keys_it_sees():
    causal, bidirectional = (dataclasses.replace(BASE, architecture=a) for a in ("decoder", "encoder"))
    saved = forward_flops(bidirectional, LENGTH) - forward_flops(causal, LENGTH)
    assert saved == 4 * LENGTH * (LENGTH - (LENGTH + 1) / 2) * BASE.embed_dim * BASE.num_layers


def test_positions_without_logits_cost_no_output_layer():
    saved = forward_flops(BASE, LENGTH) - forward_flops(BASE, LENGTH, num_predictions=10)
    assert saved == 2 * (LENGTH - 10) * BASE.embed_dim * BASE.vocab_size


def test_a_window_bounds_the_keys():
    windowed = dataclasses.replace(BASE, attention_windows=(0, 8))
    saved = forward_flops(BASE, LENGTH) - forward_flops(windowed, LENGTH)
    assert saved == 4 * LENGTH * ((LENGTH + 1) / 2 - 8) * BASE.embed_dim
