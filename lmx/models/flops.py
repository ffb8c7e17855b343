"""Floating-point operations of the model's matrix products, counted from its config."""

from lmx.model_config import Model, is_sparse
from lmx.models.feed_forward import is_gated


def forward_flops(model: Model, length: int, source_length: int = 0, num_predictions: int | None = None) -> float:
    """FLOPs of one row's forward pass; training costs three times as much.

    A multiply-add is two. Counted are all matrix products: projections, feed-forward (of a sparse layer
    top_k experts a token, whatever the capacity), scores and values, and the output layer. A causal
    row's attention counts the keys that a query may see (half of them, on average); lookups, norms and softmax
    count as nothing.

    Args:
      length: tokens of the row; the decoder's, where there are two stacks.
      source_length: tokens of the encoder's row, where there are two stacks.
      num_predictions: positions that the output layer scores; none: all of them.
    """
    head_dim = model.head_dim or model.embed_dim // model.num_heads
    inner, kv_inner = model.num_heads * head_dim, (model.num_kv_heads or model.num_heads) * head_dim
    mlp = (3 if is_gated(model) else 2) * model.embed_dim * model.mlp_dim

    def attention(queries: int, keys: int, seen: int | float) -> int | float:
        projections = queries * 2 * model.embed_dim * inner + keys * 2 * model.embed_dim * kv_inner
        return 2 * projections + 4 * queries * seen * inner

    def stack(layers: int, tokens: int, causal: bool, source: int = 0) -> float:
        total = 0.0
        for index in range(layers):
            uses = model.experts.top_k if is_sparse(model, index, decoder=source > 0) else 1
            window = model.attention_windows[index % len(model.attention_windows)] or tokens
            seen = min(window, (tokens + 1) / 2) if causal else min(2 * window - 1, tokens)
            total += attention(tokens, tokens, seen) + 2 * tokens * mlp * uses
            if source:
                total += attention(tokens, source, source)
        return total

    scored = (length if num_predictions is None else num_predictions) if {"lm", "mlm"} & set(model.heads) else 0
    logits = 2 * scored * model.embed_dim * (model.vocab_size or 0)
    if model.architecture == "encoder_decoder":
        decoder = stack(model.num_decoder_layers or model.num_layers, length, True, source_length)
        return stack(model.num_layers, source_length, False) + decoder + logits
    return stack(model.num_layers, length, model.architecture == "decoder") + logits
