"""GGUF files of Llama and its kin, as llama.cpp writes them: read in the names and the form of Hugging Face's folders.

Quantized tensors are read as float32; of the others, bfloat16 and float32 stay what they are.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lmx.errors import CheckpointError, damage_is, missing_extra
from lmx.interop.files import Tensors
from lmx.text.gguf_header import check_gguf

NAMES = {  # of a layer
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "block_sparse_moe.gate",
}
EXPERTS = {"ffn_gate_exps": "w1", "ffn_down_exps": "w2", "ffn_up_exps": "w3"}  # all experts in one tensor
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
FREQUENCIES = "rope_freqs.weight"  # what llama3's rule divides the rotary frequencies by
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


class Gguf(Tensors):
    """The tensors of a GGUF file, and the ``config.json`` that goes with them.

    Attributes:
      config: what a Hugging Face folder's ``config.json`` would say.
      fields: the file's own metadata, by key.
    """

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError:
            raise missing_extra("gguf", "hf", f"{path.name}, a GGUF file") from None
        try:
            check_gguf(path)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{path} is no GGUF file, or is damaged ({error}); fetch it again.") from None
        with damage_is(CheckpointError, str(path)):
            self._open(gguf, path)

    def _open(self, gguf: Any, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self._dequantize = gguf.quants.dequantize
        self._plain = {
            gguf.GGMLQuantizationType.F32: np.dtype(np.float32),
            gguf.GGMLQuantizationType.F16: np.dtype(np.float16),
            gguf.GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
        }
        self._architecture = self.fields.get("general.architecture", "")
        if self._architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise CheckpointError(f"{path} holds a model of architecture {self._architecture!r}; known: {known}.")
        self._tensors: dict[str, tuple[Any, int | None]] = {}  # by their name: the file's tensor, and which expert
        self.shapes, self.files = {}, {}
        for tensor in reader.tensors:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            for name, expert in _their_names(tensor.name, shape):
                self._tensors[name] = tensor, expert
                self.shapes[name] = shape if expert is None else shape[1:]
                self.files[name] = path
        self.config = self._config()
        self._whole = functools.lru_cache(maxsize=1)(self._read_whole)  # parts of a tensor are asked for in turn

    def dtype(self, name):
        return self._plain.get(self._tensors[name][0].tensor_type, np.dtype(np.float32))

    def read(self, name, index):
        return self._whole(name)[index]

    def _read_whole(self, name: str) -> np.ndarray:
        tensor, expert = self._tensors[name]
        data = tensor.data if expert is None else tensor.data[expert]
        kind = self._plain.get(tensor.tensor_type)
        if kind is None:
            values = self._dequantize(data, tensor.tensor_type)
        else:
            values = data.view(kind)
        values = values.reshape(self.shapes[name])
        heads = {"q_proj.weight": "num_attention_heads", "k_proj.weight": "num_key_value_heads"}
        key = next((key for end, key in heads.items() if name.endswith(end)), None)
        if key and self._architecture == "llama":  # llama.cpp rotates neighbours, and has its rows in that order
            split = values.reshape(self.config[key], -1, 2, values.shape[-1])
            values = split.swapaxes(1, 2).reshape(values.shape)
        return values

    def _config(self) -> dict[str, Any]:
        architecture, fields = self._architecture, self.fields

        def field(name: str, default: Any = None) -> Any:
            return fields.get(f"{architecture}.{name}", default)

        heads, width = field("attention.head_count"), field("embedding_length")
        config = {
            "model_type": architecture,
            "architectures": [ARCHITECTURES[architecture]],
            "vocab_size": self.shapes["model.embed_tokens.weight"][0],
            "hidden_size": width,
            "num_hidden_layers": field("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": field("attention.head_count_kv", heads),
            "head_dim": field("attention.key_length", field("rope.dimension_count", width // heads)),
            "intermediate_size": field("feed_forward_length"),
            "max_position_embeddings": field("context_length"),
            "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
            "rope_theta": field("rope.freq_base", 10000.0),
            "attention_bias": architecture == "llama" and "model.layers.0.self_attn.q_proj.bias" in self.shapes,
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        }
        if field("expert_count"):
            config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
            config |= {"num_local_experts": field("expert_count"), "num_experts_per_tok": field("expert_used_count")}
        elif field("attention.sliding_window"):
            config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
            config |= {"sliding_window": field("attention.sliding_window")}
        if FREQUENCIES in self._tensors:
            config["rope_scaling"] = self._llama3(config)
            for held in (self._tensors, self.shapes, self.files):
                held.pop(FREQUENCIES)
        elif field("rope.scaling.type", "none") not in ("none", None):
            original = field("rope.scaling.original_context_length")
            scaling = {"rope_type": field("rope.scaling.type"), "factor": field("rope.scaling.factor")}
            config["rope_scaling"] = scaling | ({"original_max_position_embeddings": original} if original else {})
        return config

    def _llama3(self, config: dict[str, Any]) -> dict[str, Any]:
        """The setting of llama3's rule that gives the file's frequencies; they do not say it themselves."""
        found = np.asarray(self._tensors[FREQUENCIES][0].data, np.float64)
        plain = config["rope_theta"] ** -(np.arange(0, config["head_dim"], 2) / config["head_dim"])
        original = 8192
        turns = original * plain / (2 * np.pi)
        kept = np.clip((turns - 1.0) / (4.0 - 1.0), 0, 1)
        factor = float(found.max())
        expected = 1 / (kept + (1 - kept) / factor)
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3):
            raise CheckpointError(f"{FREQUENCIES} of {self.files[FREQUENCIES]} is none of Llama 3's; not supported.")
        return LLAMA3 | {"factor": factor, "original_max_position_embeddings": original}


def _their_names(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int | None]]:
    """Hugging Face's names of a tensor; of one that holds all experts, the name and number of each."""
    if not name.startswith("blk."):
        yield WHOLE.get(name, name), None
        return
    _, layer, kind, leaf = name.split(".")
    if kind in EXPERTS:
        for expert in range(shape[0]):
            yield f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{EXPERTS[kind]}.{leaf}", expert
    else:
        yield f"model.layers.{layer}.{NAMES.get(kind, kind)}.{leaf}", None
