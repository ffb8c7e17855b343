"""Tokenizers of published checkpoints, as the folder has them: ids, special tokens and offsets as published."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmx.errors import DataError, LmxError, damage_is, located, missing_extra
from lmx.text.gguf_header import check_gguf
from lmx.text.sentence_pieces import llama_json, published_json
from lmx.text.subwords import FileTokenizer, library, read_text
from lmx.text.tokenizers import Frame, Tokenizer

# What says how the tokenizer is used; kept and written back as found.
GENERATION = "generation_config.json"
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json", GENERATION)
TOKENIZER, WORD_PIECE, MERGES = "tokenizer.json", "vocab.txt", ("vocab.json", "merges.txt")
SENTENCE_PIECE = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
ROLES = {name: f"{name.removesuffix('_token')}_id" for name in (
    "pad_token", "bos_token", "eos_token", "unk_token", "mask_token", "cls_token", "sep_token"
)}  # fmt: skip


class PublishedTokenizer(FileTokenizer):
    """The tokenizer of a folder in the form of Hugging Face's ``transformers``."""

    kind = "published"

    def __init__(self, serialized: str, settings: Mapping[str, str], ends: Any = None):
        """Opens a tokenizer.

        Args:
          serialized: the content of ``tokenizer.json``.
          settings: files of ``SETTINGS`` that are there, by name.
          ends: ``eos_token_id`` of ``config.json``, one or several, for where ``generation_config.json`` has none.

        Raises:
          DataError: a file is damaged.
        """
        super().__init__(serialized)
        self._settings = dict(settings)
        config = self._json("special_tokens_map.json") | self._json("tokenizer_config.json")
        names = self._tokenizer.get_vocab()
        named = {role: names.get(_content(config[key])) for key, role in ROLES.items() if config.get(key)}
        for role in ROLES.values():
            setattr(self, role, named.get(role) if named else _usual(role, names))
        self._honour(config)
        added = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        roles = {i for i in (getattr(self, role) for role in ROLES.values()) if i is not None}
        self.special_ids = frozenset(added | roles)
        self._config = config
        self._ends = _ends(self._settings, ends, self.vocab_size)
        self.eos_id = self._ends[0] if self.eos_id is None and self._ends else self.eos_id

    @classmethod
    def open(cls, folder: Path) -> "PublishedTokenizer":
        """Opens whichever files the folder has, or what a GGUF file holds.

        Raises:
          DataError: there are none, or they are damaged.
        """
        with located(folder), damage_is(DataError, "the tokenizer"):
            return cls._open(folder)

    @classmethod
    def _open(cls, folder: Path, ends: Any = None) -> "PublishedTokenizer":
        if folder.suffix == ".gguf":
            return cls(*_from_gguf(folder))
        settings = {name: read_text(folder / name) for name in SETTINGS if (folder / name).is_file()}
        model = folder / "config.json"
        described = _parsed(model.name, read_text(model)) if model.is_file() else {}
        config = _parsed("tokenizer_config.json", settings.get("tokenizer_config.json", "{}"))
        serialized = _serialized(folder, described.get("model_type", ""), config)
        return cls(serialized, settings, described.get("eos_token_id", ends))

    @classmethod
    def load(cls, folder: Path, lowercase: bool, ends: Sequence[int] = ()) -> "PublishedTokenizer":
        """Opens what ``save`` wrote."""
        with located(folder), damage_is(DataError, "the tokenizer"):
            return cls._open(folder, list(ends))

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text with its special tokens, and the characters (from, to) that each stands for."""
        encoding = self._tokenizer.encode(text)
        return encoding.ids, encoding.offsets

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **values: Any) -> str:
        """The text of a conversation by the folder's chat template.

        Args:
          messages: ``{"role": "user", "content": "…"}`` and so on.
          add_generation_prompt: end with what begins an answer.
          values: whatever else the template reads (tools, documents).

        Raises:
          LmxError: there is no template, or it refuses the messages.
        """
        template = self._settings.get("chat_template.jinja") or self._config.get("chat_template")
        if isinstance(template, list):  # several by name
            template = {item["name"]: item["template"] for item in template}.get("default")
        if not template:
            raise LmxError("this tokenizer has no chat template.")
        special = {key: _content(self._config[key]) for key in ROLES if self._config.get(key)}
        return _render(
            template, special | values | {"messages": messages, "add_generation_prompt": add_generation_prompt}
        )

    def frame(self, pair: bool = False) -> Frame:
        """As the folder's post-processor has it, seen on a text (or two) of one token."""
        framed = self._tokenizer.encode("a", "a" if pair else None)
        texts = framed.sequence_ids
        if 0 not in texts:
            raise DataError(
                "the tokenizer has no token for the letter 'a', so that what it puts around a text is unseen."
            )
        first, last = texts.index(0), len(texts) - texts[::-1].index(int(pair))
        ids, types = framed.ids, framed.type_ids
        between = tuple(token for token, text in zip(ids[first:last], texts[first:last], strict=True) if text is None)
        return Frame(tuple(ids[:first]), tuple(ids[last:]), between, (types[first], types[last - 1]))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokenizer's end of sequence, and what else ``generation_config.json`` names."""
        return tuple(dict.fromkeys([*super().stop_ids, *self._ends]))

    def _honour(self, config: Mapping[str, Any]) -> None:
        """Special tokens that ``tokenizer_config.json`` asks for, whatever ``tokenizer.json`` has (Llama)."""
        if "Llama" not in config.get("tokenizer_class", "") or not {"add_bos_token", "add_eos_token"} & set(config):
            return
        before = [config["bos_token"]] if config.get("add_bos_token", True) and config.get("bos_token") else []
        after = [config["eos_token"]] if config.get("add_eos_token", False) and config.get("eos_token") else []
        before, after = [[_content(token) for token in side] for side in (before, after)]
        single = [*before, "$A", *after]
        pair = [*single, *(f"{piece}:1" for piece in [*before, "$B", *after])]
        tokens = [(token, self._tokenizer.token_to_id(token)) for token in dict.fromkeys([*before, *after])]
        processors = library().processors
        self._tokenizer.post_processor = processors.TemplateProcessing(single, pair, tokens)

    def _json(self, name: str) -> dict[str, Any]:
        return _parsed(name, self._settings.get(name, "{}"))

    def _files(self):
        return self._published(), {"ends": self._ends}

    def _identity(self):
        return {name: content for name, content in self._published().items() if name != GENERATION}, {}

    def _published(self):
        files, _ = super()._files()
        return files | {name: text.encode() for name, text in self._settings.items()}


class NoTokenizer(DataError):
    """There are no files of a tokenizer."""


class MissingTokenizer(Tokenizer):
    """In the place of a tokenizer that a published checkpoint came without: it knows ids, and no texts."""

    kind = "missing"

    def __init__(self, config: Mapping[str, Any], settings: Mapping[str, str]):
        """Takes what ``config.json`` says of ids, and ``generation_config.json`` where it is there."""
        names = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
        self._config, self._settings = {name: config.get(name) for name in names}, dict(settings)
        self.vocab_size = config["vocab_size"]
        self._ends = _ends(self._settings, config.get("eos_token_id"), self.vocab_size)
        self.eos_id = next(iter(self._ends), None)
        for role in ("pad", "bos"):
            ids = _ids("config.json", config.get(f"{role}_token_id"), self.vocab_size)
            setattr(self, f"{role}_id", next(iter(ids), None))

    @classmethod
    def open(cls, folder: Path, config: Mapping[str, Any]) -> "MissingTokenizer":
        """Opens what a folder without a tokenizer has of its settings; ``config`` is its ``config.json``."""
        path = folder / GENERATION
        with located(folder), damage_is(DataError, "the tokenizer"):
            return cls(config, {GENERATION: read_text(path)} if path.is_file() else {})

    @classmethod
    def load(cls, folder: Path, lowercase: bool, config: Mapping[str, Any]) -> "MissingTokenizer":
        """Opens what ``save`` wrote."""
        return cls.open(folder, config)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ``generation_config.json`` or ``config.json`` names."""
        return tuple(self._ends)

    def frame(self, pair: bool = False) -> Frame:
        raise self.refusal()

    def refusal(self) -> NoTokenizer:
        """The error for whoever asks about texts."""
        return NoTokenizer(
            "this model came without a tokenizer: it reads ids, and no texts. Put the tokenizer's files into the "
            "folder that it came from, and open that."
        )

    def _encode_batch(self, texts):
        raise self.refusal()

    def _decode(self, ids):
        raise self.refusal()

    def _surfaces(self):
        raise self.refusal()

    def _files(self):
        return self._published(), {"config": self._config}

    def _published(self):
        return {name: text.encode() for name, text in self._settings.items()}


def _serialized(folder: Path, model_type: str, config: Mapping[str, Any]) -> str:
    """The ``tokenizer.json`` of whichever files there are."""
    if (folder / TOKENIZER).is_file():
        return read_text(folder / TOKENIZER)
    if (folder / WORD_PIECE).is_file():
        return _word_piece(folder / WORD_PIECE, config)
    if all((folder / name).is_file() for name in MERGES):
        return _byte_pairs(folder, model_type)
    found = next((folder / name for name in SENTENCE_PIECE if (folder / name).is_file()), None)
    if found is not None:
        return published_json(found, model_type, config)
    raise NoTokenizer(
        f"there is no tokenizer: {TOKENIZER}, {WORD_PIECE}, {' with '.join(MERGES)} or a SentencePiece model "
        f"({', '.join(SENTENCE_PIECE)}) was looked for."
    )


def _ends(settings: Mapping[str, str], otherwise: Any, vocab_size: int) -> list[int]:
    """The ids that ``generation_config.json`` ends a text with, or, where it names none, ``config.json``."""
    named = _parsed(GENERATION, settings.get(GENERATION, "{}")).get("eos_token_id")
    return _ids(GENERATION, named, vocab_size) or _ids("config.json", otherwise, vocab_size)


def _ids(name: str, found: Any, vocab_size: int) -> list[int]:
    """One id or several, without those that no token has (-1 stands for none)."""
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(i) is not int for i in ids):
        raise DataError(f"the token id {found!r} of {name} is no number, and no list of them.")
    return [i for i in ids if 0 <= i < vocab_size]


def _parsed(name: str, text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise DataError(f"{name} is no JSON object: {error}.") from None


def _usual(role: str, names: Mapping[str, int]) -> int | None:
    """The special token of a role where the files name none: by what BERT, RoBERTa, GPT-2 and T5 call them."""
    brackets, roberta = "[CLS]" in names, {"<s>", "</s>", "<mask>"} <= set(names)
    usual = {
        "pad_id": ("[PAD]", "<pad>"),
        "unk_id": ("[UNK]", "<unk>", "<|endoftext|>"),
        "mask_id": ("[MASK]", "<mask>"),
        "bos_id": () if brackets else ("<s>", "<|endoftext|>"),
        "eos_id": () if brackets else ("</s>", "<|endoftext|>"),
        "cls_id": ("[CLS]",) if brackets else ("<s>",) if roberta else (),
        "sep_id": ("[SEP]",) if brackets else ("</s>",) if roberta else (),
    }
    return next((names[name] for name in usual[role] if name in names), None)


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, Mapping) else token


def _word_piece(path: Path, config: Mapping[str, Any]) -> str:
    """BERT's vocab.txt."""
    pieces = read_text(path).removesuffix("\n").split("\n")
    vocabulary = {piece.rstrip("\r"): i for i, piece in enumerate(pieces)}
    return (
        library()
        .BertWordPieceTokenizer(
            vocabulary,
            lowercase=config.get("do_lower_case", True),
            strip_accents=config.get("strip_accents"),
            handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        )
        .to_str()
    )


def _byte_pairs(folder: Path, model_type: str) -> str:
    """GPT-2's and RoBERTa's vocab.json and merges.txt."""
    tokenizers = library()
    vocabulary, merges = tokenizers.models.BPE.read_file(*(str(folder / name) for name in MERGES))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if model_type == "roberta":
        sep, cls = [(name, vocabulary[name]) for name in ("</s>", "<s>")]
        tokenizer.post_processor = tokenizers.processors.RobertaProcessing(sep, cls, add_prefix_space=False)
        names = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
        specials = [tokenizers.AddedToken(name, special=True, lstrip=name == "<mask>") for name in names]
        tokenizer.add_special_tokens([token for token in specials if token.content in vocabulary])
    else:
        tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
        tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer.to_str()


def _from_gguf(path: Path) -> tuple[str, dict[str, str]]:
    """The tokenizer.json and tokenizer_config.json of a GGUF file's vocabulary."""
    try:
        import gguf
    except ImportError:
        raise missing_extra("gguf", "hf", f"{path.name}, a GGUF file") from None
    check_gguf(path)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    prefix, tokenizers = "tokenizer.ggml.", library()
    if f"{prefix}tokens" not in fields:
        raise DataError(f"{path} holds no vocabulary.")
    names, kinds = fields[f"{prefix}tokens"], fields.get(f"{prefix}token_type", [])
    control = [name for name, kind in zip(names, kinds, strict=False) if kind == gguf.TokenType.CONTROL]
    config: dict[str, Any] = {}
    for role in ("bos", "eos", "unknown", "padding"):
        if (i := fields.get(f"{prefix}{role}_token_id")) is not None:
            config[{"unknown": "unk_token", "padding": "pad_token"}.get(role, f"{role}_token")] = names[i]
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    if fields[f"{prefix}model"] == "llama":
        pieces = list(zip(names, fields[f"{prefix}scores"], strict=True))
        serialized = llama_json(pieces, control, config.get("unk_token", "<unk>"), {})
    else:
        serialized = _gguf_byte_pairs(tokenizers, fields, names, control, config)
    ends = [fields[name] for name in (f"{prefix}{end}_token_id" for end in ("eos", "eot", "eom")) if name in fields]
    settings = {"tokenizer_config.json": json.dumps(config)}
    return serialized, settings | ({GENERATION: json.dumps({"eos_token_id": ends})} if len(ends) > 1 else {})


# How texts are cut before byte pairs are merged, by the name that llama.cpp has for it.
CUTS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def _gguf_byte_pairs(tokenizers, fields, names, control, config) -> str:
    """GPT-2's kind of byte pairs, cut as the file says."""
    cut = fields.get("tokenizer.ggml.pre", "gpt-2")
    cutters = tokenizers.pre_tokenizers
    if cut in CUTS:
        split = cutters.Split(tokenizers.Regex(CUTS[cut]), "isolated")
        cutter = cutters.Sequence([split, cutters.ByteLevel(add_prefix_space=False, use_regex=False)])
    elif cut == "smollm":
        cutter = cutters.Sequence([cutters.Digits(individual_digits=True), cutters.ByteLevel(add_prefix_space=False)])
    elif cut in ("gpt-2", "default"):
        cutter = cutters.ByteLevel(add_prefix_space=False)
    else:
        known = ", ".join([*CUTS, "smollm", "gpt-2"])
        raise DataError(f"tokenizer.ggml.pre={cut!r} of the GGUF file is not supported; known: {known}.")
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, ignore_merges=cut == "llama-bpe"))
    tokenizer.pre_tokenizer, tokenizer.decoder = cutter, tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(control)
    if fields.get("tokenizer.ggml.add_bos_token", False):
        bos = config["bos_token"]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            [bos, "$A"], [bos, "$A", f"{bos}:1", "$B:1"], [(bos, vocabulary[bos])]
        )
    return tokenizer.to_str()


def _render(template: str, values: Mapping[str, Any]) -> str:
    """Renders a chat template as ``transformers`` does, in a sandbox."""
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise missing_extra("jinja2", "hf", "a chat template") from None

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: np.datetime64("now").item().strftime(pattern)
    try:
        return environment.from_string(template).render(**values)
    except TemplateError as error:
        raise LmxError(f"the chat template refused: {error}") from None
