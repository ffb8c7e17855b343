"""GPT-2 (Radford et al. 2019) and GPT-NeoX (Black et al. 2022; Pythia, Biderman et al. 2023)."""

from lmx.interop.family import Family, Field, Head, activation_name, activation_of, dense, norm, unsupported
from lmx.interop.layouts import Weight
from lmx.interop.rotary import rotary_fields, rotary_keys


class Gpt2(Family):
    """GPT-2. Its linear layers hold [inputs, outputs]."""

    model_types = ("gpt2",)
    architectures = {
        "GPT2LMHeadModel": Head(("lm",), "causal"),
        "GPT2ForSequenceClassification": Head(("classification",), "classification"),
        "GPT2Model": Head((), "none"),
    }
    fields = (
        Field("vocab_size", "vocab_size", 50257),
        Field("n_embd", "embed_dim", 768),
        Field("n_layer", "num_layers", 12),
        Field("n_head", "num_heads", 12),
        Field("n_positions", "max_length", 1024),
        Field("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Field("resid_pdrop", "dropout", 0.1),
        Field("attn_pdrop", "attention_dropout", 0.1),
        Field("initializer_range", "init_stddev", 0.02),
        Field("tie_word_embeddings", "tie_embeddings", True),
    )
    fixed = {"architecture": "decoder", "scale_residual_init": True, "pooling": "last", "pooler": "none"}
    supported = {
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    prefix = "transformer."
    output = ("lm_head.weight", "transformer.wte.weight")
    ignored = {r"transformer\.h\.\d+\.attn\.(bias|masked_bias)": "a buffer: the causal mask"}

    def extra_fields(self, config):
        return {
            "activation": activation_of("activation_function", config.get("activation_function", "gelu_new")),
            "mlp_dim": config.get("n_inner") or 4 * config.get("n_embd", 768),
        }

    def extra_keys(self, model):
        return {
            "activation_function": activation_name(model.activation),
            "n_inner": model.mlp_dim,
            "embd_pdrop": model.dropout,
        }

    def weights(self, model):
        yield Weight("embeddings/tokens/table", "transformer.wte.weight")
        yield Weight("embeddings/positions/table", "transformer.wpe.weight")
        for i in range(model.num_layers):
            ours, theirs = f"decoder/layers_{i}", f"transformer.h.{i}"
            yield from norm(f"{ours}/attention_norm", f"{theirs}.ln_1")
            for part, (name, heads) in enumerate((("query", "heads"), ("key", "kv_heads"), ("value", "kv_heads"))):
                kernel = f"embed (3 {heads} head_dim) -> embed {heads} head_dim"
                bias = f"(3 {heads} head_dim) -> {heads} head_dim"
                yield from dense(f"{ours}/attention/{name}", f"{theirs}.attn.c_attn", kernel, bias, part)
            out = "(heads head_dim) embed -> heads head_dim embed"
            yield from dense(f"{ours}/attention/out", f"{theirs}.attn.c_proj", out)
            yield from norm(f"{ours}/mlp_norm", f"{theirs}.ln_2")
            yield from dense(f"{ours}/mlp/in", f"{theirs}.mlp.c_fc", kernel="")
            yield from dense(f"{ours}/mlp/out", f"{theirs}.mlp.c_proj", kernel="")
        yield from norm("decoder/final_norm", "transformer.ln_f")
        yield from dense("heads/lm/output", "lm_head")
        yield from dense("heads/classification/output", "score")


class GptNeoX(Family):
    """GPT-NeoX and Pythia: rotary in part, attention and feed-forward in parallel."""

    model_types = ("gpt_neox",)
    architectures = {
        "GPTNeoXForCausalLM": Head(("lm",), "causal"),
        "GPTNeoXModel": Head((), "none"),
    }
    fields = (
        Field("vocab_size", "vocab_size", 50432),
        Field("hidden_size", "embed_dim", 6144),
        Field("num_hidden_layers", "num_layers", 44),
        Field("num_attention_heads", "num_heads", 64),
        Field("intermediate_size", "mlp_dim", 24576),
        Field("max_position_embeddings", "max_length", 2048),
        Field("layer_norm_eps", "norm_epsilon", 1e-5),
        Field("hidden_dropout", "dropout", 0.0),
        Field("attention_dropout", "attention_dropout", 0.0),
        Field("initializer_range", "init_stddev", 0.02),
        Field("use_parallel_residual", "parallel_residual", True),
        Field("tie_word_embeddings", "tie_embeddings", False),
    )
    fixed = {"architecture": "decoder", "position": "rotary"}
    prefix = "gpt_neox."
    output = ("embed_out.weight", "gpt_neox.embed_in.weight")
    ignored = {
        r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias)": "a buffer: the causal mask",
        r"gpt_neox\.layers\.\d+\.attention\.rotary_emb\.inv_freq": "a buffer: the rotary frequencies",
    }

    def extra_fields(self, config):
        if config.get("rope_scaling") and config["rope_scaling"].get("type", "default") == "default":
            raise unsupported("rope_scaling", config["rope_scaling"], (None,))
        return rotary_fields(config, "rotary_emb_base", "rotary_pct", default_fraction=0.25) | {
            "activation": activation_of("hidden_act", config.get("hidden_act", "gelu")),
            "attention_bias": "all" if config.get("attention_bias", True) else "none",
        }

    def extra_keys(self, model):
        return rotary_keys(model, "rotary_emb_base", "rotary_pct") | {
            "hidden_act": activation_name(model.activation),
            "attention_bias": model.attention_bias != "none",
        }

    def weights(self, model):
        yield Weight("embeddings/tokens/table", "gpt_neox.embed_in.weight")
        for i in range(model.num_layers):
            ours, theirs = f"decoder/layers_{i}", f"gpt_neox.layers.{i}"
            yield from norm(f"{ours}/attention_norm", f"{theirs}.input_layernorm")
            for part, (name, heads) in enumerate((("query", "heads"), ("key", "kv_heads"), ("value", "kv_heads"))):
                split = f"({heads} 3 head_dim)"
                kernel, bias = f"{split} embed -> embed {heads} head_dim", f"{split} -> {heads} head_dim"
                yield from dense(f"{ours}/attention/{name}", f"{theirs}.attention.query_key_value", kernel, bias, part)
            out = "embed (heads head_dim) -> heads head_dim embed"
            yield from dense(f"{ours}/attention/out", f"{theirs}.attention.dense", out)
            yield from norm(f"{ours}/mlp_norm", f"{theirs}.post_attention_layernorm")
            yield from dense(f"{ours}/mlp/in", f"{theirs}.mlp.dense_h_to_4h")
            yield from dense(f"{ours}/mlp/out", f"{theirs}.mlp.dense_4h_to_h")
        yield from norm("decoder/final_norm", "gpt_neox.final_layer_norm")
        yield from dense("heads/lm/output", "embed_out")
