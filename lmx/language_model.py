"""A trained model in the hand: what a notebook, the command line and a server hold."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, PyTree
from numpy.typing import ArrayLike

from lmx.config import Config
from lmx.errors import LmxError
from lmx.generation.forms import for_decoding, is_quantized, quantize_params
from lmx.generation.generate import Draft, bucket, generate, pad_prompts
from lmx.inputs import batch_of_ids, padded
from lmx.loading import load_model
from lmx.models.heads import num_params
from lmx.models.lora import merge_adapters
from lmx.models.stack import unroll_params
from lmx.models.transformer import Transformer
from lmx.objectives import Objective, make_objective
from lmx.objectives.causal import Causal
from lmx.objectives.classification import Classification
from lmx.objectives.mlm import MaskedLanguageModel
from lmx.objectives.prefix_lm import PrefixLM
from lmx.objectives.seq2seq import EncoderDecoderObjective
from lmx.saving import save_model
from lmx.text.published import MissingTokenizer
from lmx.text.tokenizers import Tokenizer

PREDICT_BATCH = 32  # rows that predict computes at once


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model, its parameters and its tokenizer. ``dataclasses.replace(lm, params=…)`` gives an altered one.

    Attributes:
      config: the resolved config it was trained with; ``config.model.vocab_size`` is a number.
      params: a plain pytree of arrays, without axis metadata.
      tokenizer: see :mod:`lmx.text.tokenizers`.
    """

    config: Config
    params: PyTree
    tokenizer: Tokenizer

    def __repr__(self) -> str:
        model, number = self.config.model, num_params(self.params)
        return (
            f"LanguageModel({model.architecture}, {model.num_layers} layers, {model.embed_dim} wide, "
            f"{number:,} parameters, heads {', '.join(model.heads) or 'none'}, "
            f"{type(self.tokenizer).__name__} of {self.tokenizer.vocab_size:,})"
        )

    @functools.cached_property
    def model(self) -> Transformer:
        """The pure Flax module that ``params`` belong to."""
        return Transformer(self.config.model)

    @functools.cached_property
    def objective(self) -> Objective | None:
        """What the model was trained for, if anything; it knows how text is laid out.

        Raises:
          DataError: the model came without a tokenizer.
        """
        if isinstance(self.tokenizer, MissingTokenizer):
            raise self.tokenizer.refusal()
        return None if self.config.objective.name == "none" else make_objective(self.config, self.tokenizer)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes in the order of a classifier's logits; empty for other models."""
        objective = self.config.objective
        if objective.name != "classification" or objective.task == "regression":
            return ()
        return self.config.data.labels or tuple(map(str, range(self.config.model.num_classes)))

    def logits(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
        decoder_input_ids: ArrayLike | None = None,
    ) -> Float[Array, "batch length vocab"] | Float[Array, "batch classes"] | Float[Array, "batch length 2"]:
        """Scores by the model's head, float32: classes if it was trained to classify, else its first head's.

        Args:
          input_ids: [batch, length], the encoder's where there are two stacks.
          attention_mask: [batch, length], 0 for padding on either side; none: there is no padding.
          token_type_ids: [batch, length], for models with token types; none: all 0.
          decoder_input_ids: [batch, decoder length], for encoder-decoders.

        Raises:
          LmxError: an input is missing, has another shape, or the model has no use for it.
        """
        heads = [head for head in self.config.model.heads if head != "pooler"]
        if not heads:
            raise LmxError(
                "this model has no head that scores anything; see hidden_states, or load it with num_classes."
            )
        head = "classification" if self.config.objective.name == "classification" else heads[0]
        batch = batch_of_ids(self.config.model, input_ids, attention_mask, token_type_ids, decoder_input_ids)
        return _outputs(self.model, self.params, batch, f"{head}_logits")

    def hidden_states(
        self,
        inputs: str | Sequence[str] | ArrayLike,
        attention_mask: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
        decoder_input_ids: ArrayLike | None = None,
    ) -> dict[str, Array]:
        """What every layer computed, by name: ``decoder/embeddings``, ``decoder/layer_0/attention_residual`` (the
        residual stream after attention), ``decoder/layer_0/mlp_residual`` (after the whole layer),
        ``decoder/layer_0/attention/weights`` [batch, heads, query, key], …, ``decoder/output``.

        Args:
          inputs: text or texts, laid out by :meth:`encode` and padded on the right, or ids as for :meth:`logits`.
          attention_mask, token_type_ids, decoder_input_ids: see :meth:`logits`; a mask goes with ids only.
        """
        if isinstance(inputs, str) or (len(inputs) and isinstance(inputs[0], str)):
            rows = [self.encode(text) for text in ([inputs] if isinstance(inputs, str) else inputs)]
            inputs, attention_mask = pad_prompts(rows, max(map(len, rows)), self._pad_id, left=False)
        batch = batch_of_ids(self.config.model, inputs, attention_mask, token_type_ids, decoder_input_ids)
        return _hidden_states(self.model, self.params, batch)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the special tokens that training puts around it."""
        objective = self.objective
        if isinstance(objective, Classification):
            return self._known(objective.inputs(self._record(text)))["tokens"].tolist()
        ids = self.tokenizer.encode(text)
        if self.config.tokenizer.kind == "published":
            ids = self.tokenizer.frame().around([ids])[0]
        elif isinstance(objective, EncoderDecoderObjective):
            ids = [*ids, objective.eos]
        elif isinstance(objective, MaskedLanguageModel):
            ids = [*objective.cls, *ids, *objective.sep]
        else:
            ids = [*objective.cut.before, *ids]
        return self._known({"tokens": ids})["tokens"]

    def generate(
        self,
        prompts: str | Sequence[str],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        draft: "LanguageModel | None" = None,
        draft_tokens: int = 4,
        int8_cache: bool = False,
    ) -> str | list[str]:
        """Continues texts (decoder), or answers them (encoder-decoder).

        On a CPU the first call makes a copy of the parameters that is faster to generate with, and keeps it.

        Args:
          prompts: a text, which gives a text, or several, which give a list.
          stop: a text ends before the first of these; so it does with the end-of-sequence token, or with any that a
            published checkpoint names in ``generation_config.json``.
          draft: a smaller model with the same tokenizer that proposes ``draft_tokens`` tokens at a time, which this one
            checks: the same text in fewer passes, or random text of the same distribution.
          max_new_tokens, temperature, top_k, top_p, num_beams, length_penalty, seed, int8_cache: see
            :func:`lmx.generation.generate.generate`.

        Returns:
          What the model wrote, without the prompt.

        Raises:
          LmxError: the model cannot generate, or not so much.
        """
        texts, stop = _as_list(prompts), _as_list(stop)
        objective = self.objective
        if not isinstance(objective, (Causal, EncoderDecoderObjective)):
            raise LmxError(
                f"this model was trained with objective {self.config.objective.name!r} and does not generate text; "
                "train one with 'causal', 'prefix_lm', 'span_corruption' or 'seq2seq'."
            )
        if not isinstance(draft, LanguageModel | None):
            raise LmxError(f"draft must be a model, such as lmx.load(...) opens, not {draft!r}.")
        ids = [self.encode(text) for text in texts]
        pieces = [self.tokenizer.encode(text) for text in stop]
        ends = {objective.eos, *self.tokenizer.stop_ids}
        if draft is not None and [draft.encode(text) for text in texts] != ids:
            raise LmxError(
                "the draft reads the prompt as other tokens than the model; it must have the same tokenizer."
            )
        answers = generate(
            *self._decoding,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            num_beams=num_beams,
            length_penalty=length_penalty,
            vocab_size=self.tokenizer.vocab_size if self.tokenizer.vocab_size < self.config.model.vocab_size else None,
            stop_ids=[*ends, *(piece[0] for piece in pieces if len(piece) == 1)],
            pad_id=self._pad_id,
            decoder_start_id=objective.start if isinstance(objective, EncoderDecoderObjective) else self._pad_id,
            bidirectional_prompt=isinstance(objective, PrefixLM),
            seed=seed,
            draft=None if draft is None else Draft(*draft._decoding, draft_tokens),
            int8_cache=int8_cache,
        )
        if isinstance(objective, EncoderDecoderObjective):
            ids = [[] for _ in ids]
        answers = [answer[:-1] if ends.intersection(answer[-1:]) else answer for answer in answers]
        written = [self._continuation(prompt, new) for prompt, new in zip(ids, answers, strict=True)]
        written = [_before(text, stop) for text in written]
        return written[0] if isinstance(prompts, str) else written

    def predict(self, texts: str | Sequence[str | tuple[str, str]]) -> dict[str, Any] | list[dict[str, Any]]:
        """The likeliest class of each text, or of each pair of texts; what is longer than a row loses its end.

        Returns:
          ``{"label": str, "probability": float}`` a text, ``{"score": float}`` where the model predicts a number; a
          list of them, or one where ``texts`` is one text.

        Raises:
          LmxError: the model is no classifier, or reads pairs and gets single texts or the other way round.
        """
        self._check_classifier()
        examples = [self._known(self.objective.inputs(self._record(text))) for text in _as_list(texts)]
        chunks = [examples[i : i + PREDICT_BATCH] for i in range(0, len(examples), PREDICT_BATCH)]
        found = [prediction for chunk in chunks for prediction in self._predicted(chunk)]
        return found[0] if isinstance(texts, str) else found

    def batch(
        self, texts: Sequence[str | tuple[str, str]], labels: Sequence[Any] | None = None, length: int | None = None
    ) -> dict[str, np.ndarray]:
        """Texts, or pairs of texts, as a classifier reads them: padded on the right to the longest.

        Args:
          labels: the class of each, by name or index; with them ``lm.objective.terms`` gives the loss.
          length: cut the texts so that no row has more tokens than this; none: ``config.data.length``.

        Returns:
          ``tokens``, ``segments`` (0 is padding), ``positions`` and, where the model has them, ``token_types``, int32
          [batch, length]; with labels also ``labels`` and ``label_weights`` [batch].

        Raises:
          LmxError: the model is no classifier, a text has no room, or a label is unknown.
        """
        self._check_classifier()
        data = self.config.data
        config = self.config.replace(data={"length": data.length if length is None else length, "too_long": "cut"})
        objective = make_objective(config, self.tokenizer)
        records = [self._record(text) for text in _as_list(texts)]
        if not records or (labels is not None and len(labels) != len(records)):
            found = f"{len(records)} text(s)" + ("" if labels is None else f" and {len(labels)} label(s)")
            raise LmxError(f"a batch is of one text at least, each with its label if there are any; got {found}.")
        if labels is None:
            examples = [objective.inputs(record) for record in records]
        else:
            named = [r | {self.config.data.label_field: label} for r, label in zip(records, labels, strict=True)]
            examples = [objective.view(record, np.random.default_rng(0), None) for record in named]
        return padded(list(map(self._known, examples)), max(len(example["tokens"]) for example in examples))

    def merged(self) -> "LanguageModel":
        """The same with its low-rank adapters, if it has any, merged into the parameters they add to."""
        params, model = merge_adapters(self.params, self.config.model)
        return LanguageModel(dataclasses.replace(self.config, model=model), params, self.tokenizer)

    def quantized(self) -> "LanguageModel":
        """The same model with its kernels and tables in eight bits: for generating, in a quarter of float32's memory.

        Each output of a kernel and each row of a table has a scale. It cannot be saved; it is soon made again.
        """
        done = is_quantized(self.params)
        return self if done else dataclasses.replace(self, params=quantize_params(self.model, self.params))

    def save(
        self, path: str | os.PathLike, format: str = "lmx", progress: Callable[[str, int], None] = lambda *_: None
    ) -> None:
        """Exports to a folder that :func:`load` opens; it is there only once it is whole.

        Args:
          path: a folder that does not exist yet, or is empty.
          format: "lmx": ``config.json``, ``params/`` (Orbax) and ``tokenizer/``; "hf": what ``transformers`` opens,
            adapters merged; "peft": the low-rank adapters alone, with the heads that are no longer the checkpoint's,
            as ``peft`` has them, for a model that was fine-tuned from a published checkpoint.
          progress: called with the name and the bytes of each tensor that is written; not for adapters alone.

        Raises:
          LmxError: the folder holds something, no published family can represent the model or the tokenizer, or the
            model is quantized.
        """
        if is_quantized(self.params):
            raise LmxError("this model's weights are in eight bits, which is for generating; save the one they are of.")
        save_model(self, Path(path), format, progress)

    @functools.cached_property
    def _decoding(self) -> tuple[Transformer, PyTree]:
        """Model and parameters to generate with."""
        return for_decoding(self.model, self.params)

    @property
    def _pad_id(self) -> int:
        return self.tokenizer.pad_id or 0

    def _check_classifier(self) -> None:
        if not isinstance(self.objective, Classification):
            raise LmxError(
                f"this model was trained with objective {self.config.objective.name!r} and is no classifier; "
                "fine-tune it with objective 'classification' (train.init_from)."
            )

    def _known(self, example: dict[str, Any]) -> dict[str, Any]:
        """The example, whose tokens the model must all have a row for: JAX would clip others silently."""
        rows = self.config.model.vocab_size
        if (largest := max(example["tokens"], default=0)) >= rows:
            raise LmxError(
                f"a text has the token {largest}, and the model's table has the rows 0 to {rows - 1}: this is not the "
                "model's tokenizer, or it was enlarged without the model."
            )
        return example

    def _record(self, text: str | tuple[str, str]) -> dict[str, str]:
        """A text or a pair as the record that the classifier's objective reads."""
        fields = [name for name in (self.config.data.text_field, self.config.data.pair_field) if name]
        texts = _as_list(text)
        if len(texts) != len(fields):
            wanted = "pairs of texts" if len(fields) == 2 else "single texts"
            raise LmxError(f"this classifier reads {wanted}, and got {text!r}.")
        return dict(zip(fields, texts, strict=True))

    def _predicted(self, examples: list[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
        length = min(bucket(max(len(example["tokens"]) for example in examples)), self.objective.lengths["tokens"])
        logits = np.asarray(_outputs(self.model, self.params, padded(examples, length), "classification_logits"))
        if self.objective.regression:
            return [{"score": float(score)} for score in logits[:, 0]]
        probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
        return [{"label": self.labels[row.argmax()], "probability": float(row.max())} for row in probabilities]

    def _continuation(self, prompt: list[int], new: list[int]) -> str:
        """The text that ``new`` adds; decoded with the prompt, because a piece alone loses the space before it."""
        before, whole = self.tokenizer.decode(prompt), self.tokenizer.decode([*prompt, *new])
        return whole[len(before) :] if whole.startswith(before) else self.tokenizer.decode(new)


def load(
    path: str | os.PathLike,
    *,
    step: int | None = None,
    num_classes: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None,
    progress: Callable[[str, int], None] = lambda *_: None,
) -> LanguageModel:
    """Opens a trained model.

    Args:
      path: a workdir of ``lmx train``, a folder that :meth:`LanguageModel.save` wrote, or a published checkpoint in the
        form of Hugging Face's ``transformers``, as a folder or a name on the hub; also a folder of adapters in the
        form of ``peft``, which names the published checkpoint that they belong to.
      step: of a workdir: which checkpoint; none is the newest.
      num_classes: of a published checkpoint: a classifier with so many classes. Its output layer is fresh unless the
        checkpoint has one for as many.
      mesh: of a published checkpoint: the devices to load onto; none is the first.
      dtype: of a published checkpoint: "float32" or "bfloat16"; none keeps what it has.
      progress: of a published checkpoint: called with the name and the bytes of each parameter that is there.

    Warns of what a published checkpoint lacks: a tokenizer, tensors of a head that was asked for.

    Raises:
      CheckpointError: there is no such model, it is damaged, or it cannot be represented.
      DataError: its tokenizer is damaged.
      LmxError: an option has a value that it cannot have, or is not for this kind of model.
    """
    options = {"num_classes": num_classes, "mesh": mesh, "dtype": dtype}
    return LanguageModel(*load_model(str(path), step, options, progress))


@functools.partial(jax.jit, static_argnames=("model", "name"))
def _outputs(model, params, batch, name):
    return model.apply({"params": params}, batch)[name]


@functools.partial(jax.jit, static_argnames="model")
def _hidden_states(model, params, batch):
    _, sown = model.apply({"params": params}, batch, method="hidden", mutable=["intermediates"])
    by_name = flatten_dict(unroll_params(sown["intermediates"]), sep="/")
    return {re.sub(r"/layers_(\d+)/", r"/layer_\1/", name): value for name, (value,) in by_name.items()}


def _as_list(texts: str | Sequence[Any]) -> list[Any]:
    return [texts] if isinstance(texts, str) else list(texts)


def _before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of ``stops`` in it."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
