"""What a caller gives, ids or examples, as the batch that a model reads."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lmx.errors import LmxError
from lmx.model_config import Model


def batch_of_ids(
    config: Model,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    token_type_ids: ArrayLike | None = None,
    decoder_input_ids: ArrayLike | None = None,
) -> dict[str, np.ndarray]:
    """The model's batch; a token's position is the number of tokens before it, wherever the padding is.

    Args:
      config: the model that will read it.
      input_ids, attention_mask, token_type_ids, decoder_input_ids: see :meth:`lmx.LanguageModel.logits`.

    Raises:
      LmxError: an input is missing, has another shape or values, or the model has no use for it.
    """
    two = config.architecture == "encoder_decoder"
    if two != (decoder_input_ids is not None):
        raise LmxError(
            "an encoder-decoder needs decoder_input_ids, what its decoder has written so far (at first its start "
            "token alone)."
            if two
            else f"decoder_input_ids are for encoder-decoders; this is: {config.architecture}."
        )
    if token_type_ids is not None and not config.num_token_types:
        raise LmxError("token_type_ids were given, but the model has no token types; leave them out.")
    stack = "encoder_" if two else ""
    tokens = _ids("input_ids", input_ids, config.vocab_size)
    mask = np.ones_like(tokens) if attention_mask is None else _ids("attention_mask", attention_mask, 2, tokens)
    batch = {"tokens": tokens, "segments": mask, "positions": np.maximum(np.cumsum(mask, axis=1) - 1, 0)}
    batch = {f"{stack}{name}": value.astype(np.int32) for name, value in batch.items()}
    if token_type_ids is not None:
        batch["token_types"] = _ids("token_type_ids", token_type_ids, config.num_token_types, tokens)
    if two:
        batch["decoder_tokens"] = _ids("decoder_input_ids", decoder_input_ids, config.vocab_size)
    return batch


def padded(examples: Sequence[dict[str, np.ndarray]], length: int) -> dict[str, np.ndarray]:
    """The examples as a batch, rows filled up with 0."""

    def fill(value: np.ndarray) -> np.ndarray:
        return np.pad(value, (0, length - len(value))) if np.ndim(value) else value

    return {name: np.stack([fill(example[name]) for example in examples]) for name in examples[0]}


def _ids(name: str, values: ArrayLike, limit: int, like: np.ndarray | None = None) -> np.ndarray:
    """The values as int32 [batch, length], all from 0 to below ``limit``: JAX would clip others silently."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise LmxError(f"the rows of {name} differ in length; pad them, and give an attention_mask.") from None
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "iub":
        raise LmxError(f"{name} must be whole numbers [batch, length], not {array.dtype} of shape {array.shape}.")
    if like is not None and array.shape != like.shape:
        raise LmxError(f"{name} has shape {array.shape}, but input_ids has {like.shape}.")
    if array.min() < 0 or array.max() >= limit:
        raise LmxError(f"{name} must be from 0 to {limit - 1}; found {array.min()} to {array.max()}.")
    return array.astype(np.int32)
