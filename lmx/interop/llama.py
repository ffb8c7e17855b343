"""Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3 and Mixtral: pre-norm decoders with rotary positions."""

from lmx.interop.family import Family, Field, Head, attention, dense, norm, unsupported
from lmx.interop.layouts import Weight
from lmx.interop.rotary import rotary_fields, rotary_keys


class Llama(Family):
    """Llama (Touvron et al. 2023; Grattafiori et al. 2024)."""

    model_types = ("llama",)
    architectures = {
        "LlamaForCausalLM": Head(("lm",), "causal"),
        "LlamaForSequenceClassification": Head(("classification",), "classification"),
        "LlamaModel": Head((), "none"),
    }
    fields = (
        Field("vocab_size", "vocab_size", 32000),
        Field("hidden_size", "embed_dim", 4096),
        Field("num_hidden_layers", "num_layers", 32),
        Field("num_attention_heads", "num_heads", 32),
        Field("intermediate_size", "mlp_dim", 11008),
        Field("max_position_embeddings", "max_length", 2048),
        Field("rms_norm_eps", "norm_epsilon", 1e-6),
        Field("attention_dropout", "attention_dropout", 0.0),
        Field("initializer_range", "init_stddev", 0.02),
        Field("tie_word_embeddings", "tie_embeddings", False),
    )
    fixed = {
        "architecture": "decoder",
        "norm": "rmsnorm",
        "use_bias": False,
        "position": "rotary",
        "activation": "swiglu",
        "pooling": "last",
        "pooler": "none",
    }
    supported = {"hidden_act": ("silu",), "pretraining_tp": (1, None)}
    prefix = "model."
    output = ("lm_head.weight", "model.embed_tokens.weight")
    ignored = {r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "a buffer: the rotary frequencies"}
    biases: str | None = None  # where the family has them whatever the config says

    def extra_fields(self, config):
        heads = config.get("num_attention_heads", 32)
        return rotary_fields(config) | {
            "num_kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or config.get("hidden_size", 4096) // heads,
            "attention_bias": self.biases or ("all" if config.get("attention_bias", False) else "none"),
            "mlp_bias": config.get("mlp_bias", False),
            "attention_windows": self.windows(config),
        }

    def extra_keys(self, model):
        keys = {
            "hidden_act": "silu",
            "num_key_value_heads": model.num_kv_heads or model.num_heads,
            "head_dim": model.head_dim or model.embed_dim // model.num_heads,
            "mlp_bias": bool(model.mlp_bias),
        }
        if self.biases is None:
            keys["attention_bias"] = model.attention_bias == "all"
        return rotary_keys(model) | keys | self.window_keys(model)

    def windows(self, config):
        """Attention windows of the layers."""
        return (0,)

    def window_keys(self, model):
        """The keys of :meth:`windows`."""
        return {}

    def weights(self, model):
        yield Weight("embeddings/tokens/table", "model.embed_tokens.weight")
        for i in range(model.num_layers):
            ours, theirs = f"decoder/layers_{i}", f"model.layers.{i}"
            yield from norm(f"{ours}/attention_norm", f"{theirs}.input_layernorm")
            yield from attention(f"{ours}/attention", *(f"{theirs}.self_attn.{name}_proj" for name in "qkvo"))
            yield from norm(f"{ours}/attention/query_norm", f"{theirs}.self_attn.q_norm")
            yield from norm(f"{ours}/attention/key_norm", f"{theirs}.self_attn.k_norm")
            yield from norm(f"{ours}/mlp_norm", f"{theirs}.post_attention_layernorm")
            yield from self.feed_forward(ours, theirs)
        yield from norm("decoder/final_norm", "model.norm")
        yield from dense("heads/lm/output", "lm_head")
        yield from dense("heads/classification/output", "score")

    def feed_forward(self, ours, theirs):
        """The feed-forward of a layer."""
        for name, their_name in (("in", "up"), ("gate", "gate"), ("out", "down")):
            yield from dense(f"{ours}/mlp/{name}", f"{theirs}.mlp.{their_name}_proj")


class Mistral(Llama):
    """Mistral (Jiang et al. 2023): Llama with a sliding window."""

    model_types = ("mistral",)
    architectures = {
        "MistralForCausalLM": Head(("lm",), "causal"),
        "MistralForSequenceClassification": Head(("classification",), "classification"),
        "MistralModel": Head((), "none"),
    }
    supported = {"hidden_act": ("silu",)}
    biases = "none"

    def windows(self, config):
        return (config.get("sliding_window") or 0,)

    def window_keys(self, model):
        return {"sliding_window": model.attention_windows[0] or None}


class Qwen2(Llama):
    """Qwen2 and Qwen2.5 (Yang et al. 2024): biases on queries, keys and values; windows in the later layers, if any."""

    model_types = ("qwen2",)
    architectures = {
        "Qwen2ForCausalLM": Head(("lm",), "causal"),
        "Qwen2ForSequenceClassification": Head(("classification",), "classification"),
        "Qwen2Model": Head((), "none"),
    }
    supported = {"hidden_act": ("silu",)}
    biases = "qkv"

    def windows(self, config):
        if not config.get("use_sliding_window", False) or not config.get("sliding_window"):
            return (0,)
        layers, window = config["num_hidden_layers"], config["sliding_window"]
        kinds = config.get("layer_types")
        if kinds is None:
            dense_layers = config.get("max_window_layers", 28)
            kinds = ["full_attention" if i < dense_layers else "sliding_attention" for i in range(layers)]
        known = {"full_attention": 0, "sliding_attention": window}
        if not set(kinds) <= set(known):
            raise unsupported("layer_types", kinds, tuple(known))
        return _shortest([known[kind] for kind in kinds])

    def window_keys(self, model):
        windows = [model.attention_windows[i % len(model.attention_windows)] for i in range(model.num_layers)]
        if not any(windows):
            return {"use_sliding_window": False, "sliding_window": None}
        return {
            "use_sliding_window": True,
            "sliding_window": max(windows),
            "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        }


class Qwen3(Qwen2):
    """Qwen3 (Yang et al. 2025): queries and keys are normalized, biases as the config says."""

    model_types = ("qwen3",)
    architectures = {
        "Qwen3ForCausalLM": Head(("lm",), "causal"),
        "Qwen3ForSequenceClassification": Head(("classification",), "classification"),
        "Qwen3Model": Head((), "none"),
    }
    fixed = Qwen2.fixed | {"query_key_norm": True}
    biases = None


class Mixtral(Mistral):
    """Mixtral (Jiang et al. 2024): each token uses two experts of a layer, whatever room there is."""

    model_types = ("mixtral",)
    architectures = {
        "MixtralForCausalLM": Head(("lm",), "causal"),
        "MixtralForSequenceClassification": Head(("classification",), "classification"),
        "MixtralModel": Head((), "none"),
    }

    def extra_fields(self, config):
        experts = {
            "num_experts": config.get("num_local_experts", 8),
            "every": 1,
            "top_k": config.get("num_experts_per_tok", 2),
            "normalize_gates": True,
            "capacity_factor": 0.0,
            "eval_capacity_factor": 0.0,
            "jitter": config.get("router_jitter_noise", 0.0),
            "load_balance_weight": config.get("router_aux_loss_coef", 0.001),
        }
        return super().extra_fields(config) | {"experts": experts}

    def extra_keys(self, model):
        keys = super().extra_keys(model)
        keys.pop("mlp_bias")
        return keys | {
            "num_local_experts": model.experts.num_experts,
            "num_experts_per_tok": model.experts.top_k,
            "router_jitter_noise": model.experts.jitter,
            "router_aux_loss_coef": model.experts.load_balance_weight,
        }

    def feed_forward(self, ours, theirs):
        theirs = f"{theirs}.block_sparse_moe"
        yield from dense(f"{ours}/experts/router", f"{theirs}.gate")
        for name, their_name in (("in", "w3"), ("gate", "w1"), ("out", "w2")):
            layout = "out in -> experts in out"
            yield from dense(f"{ours}/experts/{name}", f"{theirs}.experts.{{experts}}.{their_name}", layout)


def _shortest(windows):
    """The shortest part that the windows repeat, so that layers scan where they can."""
    sizes = (n for n in range(1, len(windows) + 1) if len(windows) % n == 0)
    return next(tuple(windows[:n]) for n in sizes if windows[:n] * (len(windows) // n) == windows)
