"""Small random models of every published family and variant, made by transformers."""

import numpy as np
import pytest
import torch
import transformers as hf

VOCAB = 97  # not a multiple of anything
WIDE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = WIDE | {"intermediate_size": 48, "max_position_embeddings": 64}
ROBERTA = COMMON | {"type_vocab_size": 1, "max_position_embeddings": 66}
DISTIL = {"vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "pad_token_id": 0}
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3}
T5 |= {"num_heads": 4, "decoder_start_token_id": 0}
V11 = T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SWITCH = T5 | {"num_layers": 4, "num_decoder_layers": 6, "num_experts": 4, "num_sparse_encoder_layers": 2}
SWITCH |= {"num_sparse_decoder_layers": 2, "expert_capacity": 3}
GROUPED = COMMON | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def rope(kind, **values):
    return {"rope_scaling": {"rope_type": kind, "factor": 4.0} | values}


LLAMA3 = rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
VARIANTS = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**COMMON)),
    "bert-mlm": lambda: hf.BertForMaskedLM(hf.BertConfig(**COMMON)),
    "bert-pretraining": lambda: hf.BertForPreTraining(hf.BertConfig(**COMMON)),
    "bert-classifier": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(num_labels=3, hidden_act="relu", **COMMON)
    ),
    "bert-questions": lambda: hf.BertForQuestionAnswering(hf.BertConfig(hidden_act="gelu_new", **COMMON)),
    "roberta-mlm": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**ROBERTA)),
    "roberta-classifier": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**ROBERTA)),
    "distilbert": lambda: hf.DistilBertModel(hf.DistilBertConfig(**DISTIL)),
    "distilbert-mlm": lambda: hf.DistilBertForMaskedLM(hf.DistilBertConfig(**DISTIL)),
    "distilbert-classifier": lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**DISTIL)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "gpt2-classifier": lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**GPT2)),
    "pythia": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(rotary_pct=0.5, **COMMON)),
    "neox-serial": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(use_parallel_residual=False, attention_bias=False, **COMMON)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "t5-v1.1": lambda: untied(hf.T5ForConditionalGeneration(hf.T5Config(**V11))),
    "mt5": lambda: untied(hf.MT5ForConditionalGeneration(hf.MT5Config(**V11))),
    "switch": lambda: hf.SwitchTransformersForConditionalGeneration(hf.SwitchTransformersConfig(**SWITCH)),
    # With room for all tokens: decoding a token at a time, as we do, no expert is ever full. Theirs cannot decode so
    # (it fails where the decoder is deeper than the encoder), and computing all tokens at each step fills them.
    "switch-roomy": lambda: hf.SwitchTransformersForConditionalGeneration(
        hf.SwitchTransformersConfig(**SWITCH | {"expert_capacity": 80})
    ),
    "llama2": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**COMMON)),
    "llama-biases": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=16, **GROUPED)
    ),
    "llama3": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA3, **GROUPED)),
    "llama-linear": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**rope("linear"), **GROUPED)),
    "llama-dynamic": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**rope("dynamic"), **GROUPED | {"max_position_embeddings": 8})
    ),
    "llama-yarn": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**rope("yarn", original_max_position_embeddings=16), **GROUPED)
    ),
    "llama-classifier": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**GROUPED)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(sliding_window=5, **GROUPED)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
    "qwen2-windows": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(use_sliding_window=True, sliding_window=4, max_window_layers=1, **GROUPED)
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(head_dim=8, **GROUPED)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=4, **GROUPED)),
}
GENERATES = [
    *("gpt2", "pythia", "neox-serial", "t5", "t5-v1.1", "mt5", "switch-roomy"),
    *("llama2", "llama3", "llama-linear", "llama-yarn", "mistral", "qwen2", "qwen2-windows", "qwen3", "mixtral"),
]


def few(variants, *quick):
    """All variants; those that are not named run with the slow tests only."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in variants]


def untied(model):
    """The model with an output layer of its own, as T5 v1.1 has it."""
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    return model


def make(variant):
    """The model with random weights, all of them large enough to matter."""
    model = VARIANTS[variant]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.15 if parameter.ndim > 1 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(model, rows=2, length=12):
    """Ids and a mask with padding on the right of the second row, and a decoder's ids where there is one."""
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(3, VOCAB, (rows, length)), np.ones((rows, length), np.int64)
    mask[1, length - 4 :] = 0
    pad = model.config.pad_token_id
    ids[mask == 0] = 0 if pad is None else pad
    found = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        found["decoder_input_ids"] = rng.integers(3, VOCAB, (rows, 7))
    return found


def torch_inputs(model):
    """The same as tensors."""
    return {name: torch.tensor(value) for name, value in inputs(model).items()}
