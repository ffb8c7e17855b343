"""GGUF files, written by the gguf package, against transformers' own reader of them."""

import gguf
import numpy as np
import pytest
import torch

import lmx
from lmx.errors import CheckpointError
from lmx.interop.gguf import NAMES, WHOLE
from tests.interop import zoo

TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(60)), "▁", "a", "b", "c", "▁a", "ab", "▁ab"]
TOKENS += [f"w{i}" for i in range(zoo.VOCAB - len(TOKENS))]


def permuted(weight, heads):
    """Rows in llama.cpp's order: the two halves of each head interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def write(path, model, architecture, quantized=None, **more):
    """A GGUF file of a transformers model, as llama.cpp's converter makes it."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    writer.add_vocab_size(config.vocab_size)
    for key, value in more.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-float(i) for i in range(len(TOKENS))])
    writer.add_token_types(
        [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.NORMAL] * (len(TOKENS) - 3)]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    theirs = {name: ours for ours, name in NAMES.items()}
    for name, tensor in model.state_dict().items():
        value = tensor.numpy()
        if name in WHOLE.values():
            name = next(ours for ours, whole in WHOLE.items() if whole == name)
        else:
            _, _, layer, *kind, leaf = name.split(".")
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            if architecture == "llama" and kind[-1] in heads and leaf == "weight":
                value = permuted(value, heads[kind[-1]])
            name = f"blk.{layer}.{theirs['.'.join(kind)]}.{leaf}"
        if quantized is not None and value.ndim == 2 and value.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(value, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model):
    with torch.no_grad():
        return model(**zoo.torch_inputs(model)).logits.numpy()


@pytest.mark.parametrize("variant, architecture", [("llama2", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")])
def test_logits_are_those_of_the_model_that_was_written(variant, architecture, tmp_path):
    model = zoo.make(variant)
    lm = lmx.load(write(tmp_path / "model.gguf", model, architecture))
    inputs, expected = zoo.inputs(model), logits(model)
    found, real = np.asarray(lm.logits(inputs["input_ids"], inputs["attention_mask"])), inputs["attention_mask"] > 0
    np.testing.assert_allclose(found[real], expected[real], atol=1e-5 * np.abs(expected).max())
    assert lm.encode("ab a") == [1, TOKENS.index("▁ab"), TOKENS.index("▁a")]


def test_quantized_tensors_are_what_the_format_makes_of_them(tmp_path):
    kind, model = gguf.GGMLQuantizationType.Q8_0, zoo.make("llama2")
    path = write(tmp_path / "model.gguf", model, "llama", kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and parameter.shape[1] % 32 == 0:
                parameter.copy_(
                    torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(parameter.numpy(), kind), kind))
                )
    inputs, expected = zoo.inputs(model), logits(model)
    found, real = lmx.load(path).logits(inputs["input_ids"], inputs["attention_mask"]), inputs["attention_mask"] > 0
    np.testing.assert_allclose(np.asarray(found)[real], expected[real], atol=1e-5 * np.abs(expected).max())


def test_damaged_and_foreign_files_are_told(tmp_path):
    path = write(tmp_path / "model.gguf", zoo.make("llama2"), "llama")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="model.gguf is no GGUF file, or is damaged"):
        lmx.load(path)
    path.write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="model.gguf is no GGUF file, or is damaged"):
        lmx.load(path)
    foreign = write(tmp_path / "foreign.gguf", zoo.make("llama2"), "falcon")
    with pytest.raises(CheckpointError, match="architecture 'falcon'; known: llama, qwen2, qwen3"):
        lmx.load(foreign)
