"""T5, T5 v1.1, mT5 and byT5 (Raffel et al. 2020; Xue et al. 2021, 2022), and Switch Transformer (Fedus et al. 2021)."""

from lmx.interop.family import Family, Field, Head, activation_name, activation_of, attention, dense, norm, unsupported
from lmx.interop.layouts import Weight

GATED = {"geglu": "gated-gelu", "swiglu": "gated-silu"}


class T5(Family):
    """T5 and byT5. Where the output layer is tied, states are scaled before it (v1.0); else they are not (v1.1)."""

    model_types = ("t5",)
    architectures = {
        "T5ForConditionalGeneration": Head(("lm",), "seq2seq"),
        "T5Model": Head((), "none"),
    }
    fields = (
        Field("vocab_size", "vocab_size", 32128),
        Field("d_model", "embed_dim", 512),
        Field("d_kv", "head_dim", 64),
        Field("d_ff", "mlp_dim", 2048),
        Field("num_layers", "num_layers", 6),
        Field("num_heads", "num_heads", 8),
        Field("relative_attention_num_buckets", "relative_buckets", 32),
        Field("relative_attention_max_distance", "relative_max_distance", 128),
        Field("dropout_rate", "dropout", 0.1),
        Field("layer_norm_epsilon", "norm_epsilon", 1e-6),
    )
    fixed = {
        "architecture": "encoder_decoder",
        "norm": "rmsnorm",
        "use_bias": False,
        "position": "relative",
        "attention_scale": "none",
        "initializer": "fan_in",
        "embedding_stddev": 1.0,
    }
    output = ("lm_head.weight", "shared.weight")
    duplicates = {f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")}
    ignored = {
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight": "T5 left it over unused"
    }

    def extra_fields(self, config):
        tied = config.get("tie_word_embeddings", True)
        dropout = config.get("dropout_rate", 0.1)
        return {
            "num_decoder_layers": config.get("num_decoder_layers") or config.get("num_layers", 6),
            "activation": self.activation(config.get("feed_forward_proj", "relu")),
            "tie_embeddings": tied,
            "scale_logits": config.get("scale_decoder_outputs", tied),
            "mlp_dropout": dropout,
            "attention_dropout": dropout,
            "final_dropout": dropout,
        }

    def activation(self, name):
        """Ours for ``feed_forward_proj``."""
        gated = {theirs: ours for ours, theirs in GATED.items()} | {"gated-gelu_new": "geglu"}
        if name in gated:
            return gated[name]
        if name.startswith("gated-"):
            raise unsupported("feed_forward_proj", name, tuple(gated))
        return activation_of("feed_forward_proj", name)

    def extra_keys(self, model):
        plain = model.activation not in GATED
        return {
            "num_decoder_layers": model.num_decoder_layers or model.num_layers,
            "feed_forward_proj": activation_name(model.activation) if plain else GATED[model.activation],
            "tie_word_embeddings": model.tie_embeddings,
            "scale_decoder_outputs": model.scale_logits,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "is_encoder_decoder": True,
        }

    def weights(self, model):
        yield Weight("embeddings/tokens/table", "shared.weight")
        yield from self.stack("encoder", model.num_layers, model)
        yield from self.stack("decoder", model.num_decoder_layers or model.num_layers, model)
        yield from dense("heads/lm/output", "lm_head")

    def stack(self, stack, layers, model):
        """The layers of a stack."""
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield Weight(f"{stack}/relative_bias/table", bias, "buckets heads -> heads buckets")
        for i in range(layers):
            ours, theirs = f"{stack}/layers_{i}", f"{stack}.block.{i}.layer"
            yield from norm(f"{ours}/attention_norm", f"{theirs}.0.layer_norm")
            yield from attention(f"{ours}/attention", *(f"{theirs}.0.SelfAttention.{name}" for name in "qkvo"))
            last = 1
            if stack == "decoder":
                yield from norm(f"{ours}/cross_attention_norm", f"{theirs}.1.layer_norm")
                cross = (f"{theirs}.1.EncDecAttention.{name}" for name in "qkvo")
                yield from attention(f"{ours}/cross_attention", *cross)
                last = 2
            yield from norm(f"{ours}/mlp_norm", f"{theirs}.{last}.layer_norm")
            yield from self.feed_forward(ours, f"{theirs}.{last}", model)
        yield from norm(f"{stack}/final_norm", f"{stack}.final_layer_norm")

    def feed_forward(self, ours, theirs, model):
        """The feed-forward of a layer."""
        gated = model.activation in GATED
        yield from dense(f"{ours}/mlp/in", f"{theirs}.DenseReluDense.{'wi_1' if gated else 'wi'}")
        yield from dense(f"{ours}/mlp/gate", f"{theirs}.DenseReluDense.wi_0")
        yield from dense(f"{ours}/mlp/out", f"{theirs}.DenseReluDense.wo")


class MT5(T5):
    """mT5: T5 v1.1 in many languages; states are never scaled."""

    model_types = ("mt5",)
    architectures = {
        "MT5ForConditionalGeneration": Head(("lm",), "seq2seq"),
        "MT5Model": Head((), "none"),
    }
    fixed = T5.fixed | {"scale_logits": False}

    def extra_fields(self, config):
        return super().extra_fields(config) | {"scale_logits": False}


class Switch(T5):
    """Switch Transformer: T5 with experts of a fixed capacity."""

    model_types = ("switch_transformers",)
    architectures = {
        "SwitchTransformersForConditionalGeneration": Head(("lm",), "seq2seq"),
        "SwitchTransformersModel": Head((), "none"),
    }
    fields = tuple(field for field in T5.fields if field.field not in ("head_dim", "mlp_dim", "embed_dim")) + (
        Field("d_model", "embed_dim", 768),
        Field("d_kv", "head_dim", 64),
        Field("d_ff", "mlp_dim", 2048),
    )
    supported = {
        "router_bias": (False,),
        "router_type": ("tokens_masked",),
        "router_dtype": ("float32",),
        "dense_act_fn": ("relu",),
    }

    def extra_fields(self, config):
        layers = config.get("num_layers", 12)
        decoder_layers = config.get("num_decoder_layers") or layers
        every = _step(config, "encoder", layers)
        decoder_every = _step(config, "decoder", decoder_layers)
        fields = super().extra_fields(config)
        fields["experts"] = {
            "num_experts": config.get("num_experts", 8),
            "every": every,
            "decoder_every": decoder_every,
            "first": 1 if min(every, decoder_every) > 1 else 0,
            "capacity": config.get("expert_capacity", 64),
            "jitter": config.get("router_jitter_noise", 0.01),
            "load_balance_weight": config.get("router_aux_loss_coef", 0.001),
            "z_loss_weight": config.get("router_z_loss_coef", 0.001),
        }
        return fields | {"activation": "relu", "init_scale": 0.1}

    def extra_keys(self, model):
        experts = model.experts
        decoder_layers = model.num_decoder_layers or model.num_layers
        keys = super().extra_keys(model)
        keys.pop("feed_forward_proj")
        return keys | {
            "num_experts": experts.num_experts,
            "expert_capacity": experts.capacity,
            "num_sparse_encoder_layers": model.num_layers // experts.every,
            "num_sparse_decoder_layers": decoder_layers // (experts.decoder_every or experts.every),
            "router_jitter_noise": experts.jitter,
            "router_aux_loss_coef": experts.load_balance_weight,
            "router_z_loss_coef": experts.z_loss_weight,
            "dense_act_fn": model.activation,
        }

    def feed_forward(self, ours, theirs, model):
        yield from dense(f"{ours}/mlp/in", f"{theirs}.mlp.wi")
        yield from dense(f"{ours}/mlp/out", f"{theirs}.mlp.wo")
        yield from dense(f"{ours}/experts/router", f"{theirs}.mlp.router.classifier")
        names = f"{theirs}.mlp.experts.expert_{{experts}}"
        yield from dense(f"{ours}/experts/in", f"{names}.wi", "mlp embed -> experts embed mlp")
        yield from dense(f"{ours}/experts/out", f"{names}.wo", "embed mlp -> experts mlp embed")


def _step(config, stack, layers):
    """Every how many layers there are experts."""
    return config.get(f"{stack}_sparse_step") or layers // (config.get(f"num_sparse_{stack}_layers", 3) or layers)
