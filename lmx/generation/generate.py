"""Text from a model: what a caller gives, made into rows for :mod:`lmx.generation.decode`, and back.

Lengths are rounded up to a few sizes: a prompt of a new length finds a compiled program.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from lmx.errors import LmxError
from lmx.generation.beams import search
from lmx.generation.decode import Rules, first, loop, prefill
from lmx.generation.sampling import make_sampling
from lmx.generation.speculative import speculate
from lmx.model_config import Model
from lmx.models.transformer import Transformer

BUCKET = 64  # lengths above it are rounded up to its multiples, those below to powers of two


@dataclasses.dataclass(frozen=True)
class Draft:
    """A smaller model that proposes tokens; see :mod:`lmx.generation.speculative`.

    Attributes:
      model, params: of the same architecture and vocabulary as the model that checks.
      num_tokens: proposed at a time.
    """

    model: Transformer
    params: PyTree
    num_tokens: int = 4


def generate(
    model: Transformer,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    vocab_size: int | None = None,
    stop_ids: Iterable[int] = (),
    pad_id: int = 0,
    decoder_start_id: int = 0,
    bidirectional_prompt: bool = False,
    seed: int = 0,
    draft: Draft | None = None,
    int8_cache: bool = False,
) -> list[list[int]]:
    """Continues prompts (decoder), or answers them (encoder-decoder).

    Args:
      model: a model with an "lm" head and a decoder.
      params: its parameters, without axis metadata.
      prompts: token ids, at least one a prompt; the encoder's input where there are two stacks.
      max_new_tokens: most tokens generated a row.
      temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
      top_k: draw from the so many likeliest tokens; 0 from all.
      top_p: draw from the fewest tokens that hold this probability; 1 from all.
      num_beams: texts that are followed at a time (:mod:`lmx.generation.beams`); 1 follows one, token by token.
      length_penalty: of several beams, the power of a text's length that its log-likelihood is divided by.
      vocab_size: ids from here on have no token and are not chosen.
      stop_ids: tokens that end a row.
      pad_id: fills what is not a token.
      decoder_start_id: what an encoder-decoder's decoder starts from.
      bidirectional_prompt: prompt tokens see each other in both directions (prefix LM).
      seed: of the random draws. Row i's draws are those of its own place, whatever the other rows are; with a draft
        only as long as the rows are the same, as how far all go at a time is up to each of them.
      draft: a model that proposes tokens, so that several can be had of one pass of ``model``. It changes how many
        passes there are and not how likely a text is: of the likeliest tokens all are the same, of random ones others.
      int8_cache: keep keys and values in eight bits: of a model in float32 a quarter of their memory, at some error.

    Returns:
      The new tokens of each row; the stop token, where one came, is the last.

    Raises:
      LmxError: the model cannot generate, an argument is out of range, a row would be longer than a learned
        position table, or the draft does not fit the model.
    """
    _check_model(model.config)
    _check_beams(num_beams, temperature, draft)
    if draft is not None:
        _check_draft(model.config, draft)
    sampling = make_sampling(temperature, top_k, top_p, vocab_size)
    configs = {"model": model.config} | ({"the draft's model": draft.model.config} if draft else {})
    if not prompts:
        return []
    for name, config in configs.items():
        _check_lengths(name, config, prompts, max_new_tokens)
    length = min(bucket(max(map(len, prompts))), *map(_longest, configs.values()))
    padded = pad_prompts(prompts, length, pad_id, left=model.config.architecture == "decoder")
    tokens, segments = map(jnp.asarray, padded)
    room = bucket(max_new_tokens) + (draft.num_tokens if draft else 0)
    options = {
        "new_slots": room,
        "decoder_start_id": decoder_start_id,
        "bidirectional_prompt": bidirectional_prompt,
        "int8_cache": int8_cache,
    }
    logits, decoding = prefill(model, params, tokens, segments, **options)
    stops = jnp.asarray(sorted(set(stop_ids)), jnp.int32)
    rules = Rules(sampling, _row_keys(seed, len(prompts)), stops, pad_id)
    if num_beams > 1:
        found = search(model, params, logits, decoding, rules, max_new_tokens, length_penalty, num_beams, room)
        return _trimmed(jax.device_get(found)[:, :max_new_tokens], stop_ids)
    generated = first(logits, rules, room)
    if draft is None:
        generated, _ = loop(model, params, generated, decoding, rules, max_new_tokens)
    else:
        _, drafting = prefill(draft.model, draft.params, tokens, segments, **options)
        models, both = (model, draft.model), (params, draft.params)
        states = (decoding, drafting)
        generated, _ = speculate(models, both, generated, states, rules, max_new_tokens, draft.num_tokens)
    return _trimmed(jax.device_get(generated.tokens)[:, :max_new_tokens], stop_ids)


@functools.partial(jax.jit, static_argnames="rows")
def _row_keys(seed, rows):
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(rows))


def bucket(length: int) -> int:
    """The length that rows of ``length`` tokens are padded to: a power of two, above 64 a multiple of 64."""
    return -(-length // BUCKET) * BUCKET if length > BUCKET else 1 << (length - 1).bit_length()


def pad_prompts(
    prompts: Sequence[Sequence[int]], length: int, pad_id: int, *, left: bool
) -> tuple[Int[np.ndarray, "batch length"], Int[np.ndarray, "batch length"]]:
    """Tokens and segments (1 for tokens, 0 for padding) of prompts padded to ``length``."""
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    segments = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        place = slice(length - len(prompt), length) if left else slice(0, len(prompt))
        tokens[row, place], segments[row, place] = prompt, 1
    return tokens, segments


def _trimmed(rows: Any, stop_ids: Iterable[int]) -> list[list[int]]:
    """The rows as lists, each up to and with its first stop token."""
    ends = set(stop_ids)
    found = ((row, next((i for i, token in enumerate(row) if token in ends), len(row))) for row in rows.tolist())
    return [row[: end + 1] for row, end in found]


def _longest(config: Model) -> int:
    """Most positions that a row may have."""
    return config.max_length if config.position == "learned" else sys.maxsize


def _check_model(config: Model) -> None:
    if config.architecture == "encoder":
        raise LmxError("an encoder reads text and cannot generate any; model.architecture must have a decoder.")
    if "lm" not in config.heads:
        raise LmxError(f"generating needs the head 'lm' in model.heads; this model has {config.heads}.")


def _check_beams(num_beams: int, temperature: float, draft: Draft | None) -> None:
    if num_beams < 1:
        raise LmxError(f"num_beams must be at least 1, not {num_beams}.")
    if num_beams > 1 and (temperature or draft is not None):
        raise LmxError("several beams look for the likeliest text: set temperature=0 and no draft, or num_beams=1.")


def _check_draft(config: Model, draft: Draft) -> None:
    theirs = draft.model.config
    if draft.num_tokens < 1:
        raise LmxError(f"a draft must propose at least 1 token at a time, not {draft.num_tokens}.")
    for name in ("architecture", "vocab_size"):
        ours, other = getattr(config, name), getattr(theirs, name)
        if ours != other:
            raise LmxError(
                f"the draft's model.{name} is {other!r} and the model's is {ours!r}; a draft must have the same, and "
                "the same tokenizer."
            )
    if "dynamic" in (config.rotary_scaling.kind, theirs.rotary_scaling.kind):
        raise LmxError(
            "rotary_scaling.kind='dynamic' goes by the length of what is computed at once, which a draft changes; "
            "generate without one."
        )
    for model, name in ((config, "model"), (theirs, "draft")):
        if model.experts.num_experts and model.experts.eval_capacity_factor:
            raise LmxError(
                f"the {name}'s experts drop tokens beyond their capacity, which several at a time would change; "
                "generate without a draft, or with models whose model.experts.eval_capacity_factor is 0."
            )


def _check_lengths(name: str, config: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise LmxError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    if not all(len(prompt) for prompt in prompts):
        raise LmxError("a prompt is empty; generating starts from at least one token.")
    prompt = max(map(len, prompts))
    two = config.architecture == "encoder_decoder"
    needed = max(prompt, max_new_tokens) if two else prompt + max_new_tokens
    if needed > _longest(config):
        raise LmxError(
            f"a prompt of {prompt} tokens and {max_new_tokens} new ones do not fit {name}.max_length "
            f"({config.max_length}), the positions that the learned table holds; shorten the prompt or lower "
            "max_new_tokens."
        )
