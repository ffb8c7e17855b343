"""BERT, RoBERTa and DistilBERT: post-norm encoders (Devlin et al. 2019; Liu et al. 2019; Sanh et al. 2019)."""

from lmx.interop.family import (
    Family,
    Field,
    Head,
    Unlike,
    activation_name,
    activation_of,
    attention,
    dense,
    norm,
)
from lmx.interop.layouts import Weight

POST_NORM_ENCODER = {
    "architecture": "encoder",
    "norm_position": "post",
    "position": "learned",
    "embedding_norm": True,
    "pooling": "first",
}


def encoder_layer(ours, attention_names, attention_norm, up, down, mlp_norm):
    """One layer; the names are those of the published tensors."""
    yield from attention(f"{ours}/attention", *attention_names)
    yield from norm(f"{ours}/attention_norm", attention_norm)
    yield from dense(f"{ours}/mlp/in", up)
    yield from dense(f"{ours}/mlp/out", down)
    yield from norm(f"{ours}/mlp_norm", mlp_norm)


def embeddings(theirs):
    """Tables and their norm."""
    yield Weight("embeddings/tokens/table", f"{theirs}.word_embeddings.weight")
    yield Weight("embeddings/positions/table", f"{theirs}.position_embeddings.weight")
    yield Weight("embeddings/token_types/table", f"{theirs}.token_type_embeddings.weight")
    yield from norm("embeddings/norm", f"{theirs}.LayerNorm")


def vocabulary(theirs_weight, theirs_bias):
    """The output layer of the masked language model; the weight is there where it is not tied."""
    yield Weight("heads/mlm/vocabulary/output/kernel", theirs_weight, "vocab embed -> embed vocab")
    yield Weight("heads/mlm/vocabulary/bias", theirs_bias)


class Bert(Family):
    """BERT."""

    model_types = ("bert",)
    architectures = {
        "BertModel": Head(("pooler",), "none"),
        "BertForPreTraining": Head(("mlm", "classification"), "mlm"),
        "BertForMaskedLM": Head(("mlm",), "mlm"),
        "BertForSequenceClassification": Head(("classification",), "classification"),
        "BertForQuestionAnswering": Head(("span",), "none"),
    }
    fields = (
        Field("vocab_size", "vocab_size", 30522),
        Field("hidden_size", "embed_dim", 768),
        Field("num_hidden_layers", "num_layers", 12),
        Field("num_attention_heads", "num_heads", 12),
        Field("intermediate_size", "mlp_dim", 3072),
        Field("max_position_embeddings", "max_length", 512),
        Field("type_vocab_size", "num_token_types", 2),
        Field("layer_norm_eps", "norm_epsilon", 1e-12),
        Field("hidden_dropout_prob", "dropout", 0.1),
        Field("attention_probs_dropout_prob", "attention_dropout", 0.1),
        Field("initializer_range", "init_stddev", 0.02),
        Field("tie_word_embeddings", "tie_embeddings", True),
    )
    fixed = POST_NORM_ENCODER | {"pooler": "tanh"}
    supported = {"position_embedding_type": ("absolute",), "is_decoder": (False,), "add_cross_attention": (False,)}
    prefix = "bert."
    output = ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight")
    duplicates = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
    ignored = {r"bert\.embeddings\.position_ids": "a buffer of 0, 1, 2, …"}

    def extra_fields(self, config):
        return {"activation": activation_of("hidden_act", config.get("hidden_act", "gelu"))}

    def extra_keys(self, model):
        if not model.num_token_types:
            raise Unlike("it has no token types")
        return {"hidden_act": activation_name(model.activation)}

    def weights(self, model):
        body = self.prefix
        yield from embeddings(f"{body}embeddings")
        for i in range(model.num_layers):
            theirs = f"{body}encoder.layer.{i}"
            own = f"{theirs}.attention.self"
            names = (f"{own}.query", f"{own}.key", f"{own}.value", f"{theirs}.attention.output.dense")
            yield from encoder_layer(
                f"encoder/layers_{i}",
                names,
                f"{theirs}.attention.output.LayerNorm",
                f"{theirs}.intermediate.dense",
                f"{theirs}.output.dense",
                f"{theirs}.output.LayerNorm",
            )
        yield from self.heads(model)

    def heads(self, model):
        """The part of the table that is not the body."""
        yield from dense("heads/pooler/dense", f"{self.prefix}pooler.dense")
        yield from dense("heads/classification/pooler/dense", f"{self.prefix}pooler.dense")
        next_sentence = "mlm" in model.heads
        yield from dense("heads/classification/output", "cls.seq_relationship" if next_sentence else "classifier")
        yield from dense("heads/mlm/dense", "cls.predictions.transform.dense")
        yield from norm("heads/mlm/norm", "cls.predictions.transform.LayerNorm")
        yield from vocabulary("cls.predictions.decoder.weight", "cls.predictions.bias")
        yield from dense("heads/span", "qa_outputs")


class Roberta(Bert):
    """RoBERTa: BERT with positions counted from 2 and a classifier on the first token itself."""

    model_types = ("roberta", "xlm-roberta")
    architectures = {
        "RobertaModel": Head(("pooler",), "none"),
        "RobertaForMaskedLM": Head(("mlm",), "mlm"),
        "RobertaForSequenceClassification": Head(("classification",), "classification"),
        "RobertaForQuestionAnswering": Head(("span",), "none"),
        "XLMRobertaModel": Head(("pooler",), "none"),
        "XLMRobertaForMaskedLM": Head(("mlm",), "mlm"),
        "XLMRobertaForSequenceClassification": Head(("classification",), "classification"),
        "XLMRobertaForQuestionAnswering": Head(("span",), "none"),
    }
    fields = tuple(field for field in Bert.fields if field.field != "max_length")
    supported = Bert.supported | {"hidden_act": ("gelu",), "pad_token_id": (1,)}  # positions are counted from it
    prefix = "roberta."
    output = ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight")
    duplicates = {"lm_head.decoder.bias": "lm_head.bias"}
    ignored = {r"roberta\.embeddings\.position_ids": "a buffer of 0, 1, 2, …"}

    def extra_fields(self, config):
        length = config.get("max_position_embeddings", 514) - 2
        return super().extra_fields(config) | {"max_length": length, "position_offset": 2}

    def extra_keys(self, model):
        return super().extra_keys(model) | {
            "max_position_embeddings": model.max_length + model.position_offset,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
        }

    def heads(self, model):
        yield from dense("heads/pooler/dense", "roberta.pooler.dense")
        yield from dense("heads/classification/pooler/dense", "classifier.dense")
        yield from dense("heads/classification/output", "classifier.out_proj")
        yield from dense("heads/mlm/dense", "lm_head.dense")
        yield from norm("heads/mlm/norm", "lm_head.layer_norm")
        yield from vocabulary("lm_head.decoder.weight", "lm_head.bias")
        yield from dense("heads/span", "qa_outputs")


class DistilBert(Family):
    """DistilBERT: BERT without token types, and a classifier with a rectifier."""

    model_types = ("distilbert",)
    architectures = {
        "DistilBertModel": Head((), "none"),
        "DistilBertForMaskedLM": Head(("mlm",), "mlm"),
        "DistilBertForSequenceClassification": Head(("classification",), "classification"),
        "DistilBertForQuestionAnswering": Head(("span",), "none"),
    }
    fields = (
        Field("vocab_size", "vocab_size", 30522),
        Field("dim", "embed_dim", 768),
        Field("n_layers", "num_layers", 6),
        Field("n_heads", "num_heads", 12),
        Field("hidden_dim", "mlp_dim", 3072),
        Field("max_position_embeddings", "max_length", 512),
        Field("dropout", "dropout", 0.1),
        Field("attention_dropout", "attention_dropout", 0.1),
        Field("seq_classif_dropout", "head_dropout", 0.2),
        Field("initializer_range", "init_stddev", 0.02),
        Field("tie_word_embeddings", "tie_embeddings", True),
    )
    fixed = POST_NORM_ENCODER | {"pooler": "relu", "norm_epsilon": 1e-12, "num_token_types": 0}
    prefix = "distilbert."
    output = ("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight")
    ignored = {r"distilbert\.embeddings\.position_ids": "a buffer of 0, 1, 2, …"}

    def extra_fields(self, config):
        return {"activation": activation_of("activation", config.get("activation", "gelu"))}

    def extra_keys(self, model):
        return {"activation": activation_name(model.activation)}

    def weights(self, model):
        yield from embeddings("distilbert.embeddings")
        for i in range(model.num_layers):
            theirs = f"distilbert.transformer.layer.{i}"
            yield from encoder_layer(
                f"encoder/layers_{i}",
                [f"{theirs}.attention.{name}_lin" for name in ("q", "k", "v", "out")],
                f"{theirs}.sa_layer_norm",
                f"{theirs}.ffn.lin1",
                f"{theirs}.ffn.lin2",
                f"{theirs}.output_layer_norm",
            )
        yield from dense("heads/classification/pooler/dense", "pre_classifier")
        yield from dense("heads/classification/output", "classifier")
        yield from dense("heads/mlm/dense", "vocab_transform")
        yield from norm("heads/mlm/norm", "vocab_layer_norm")
        yield from vocabulary("vocab_projector.weight", "vocab_projector.bias")
        yield from dense("heads/span", "qa_outputs")
