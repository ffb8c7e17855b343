"""SentencePiece models as the ``tokenizer.json`` of the ``tokenizers`` library, which ``transformers`` reads."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmx.errors import DataError, missing_extra
from lmx.text.subwords import LINE_SYMBOLS, SPACE, library, sentinels
from lmx.text.tokenizers import check_sentinels

Pieces = Sequence[tuple[str, float]]
NEVER = -1e4  # a score that no way to cut a text has room for
NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # kinds of pieces in sentencepiece_model.proto; below, of models
BPE = 2
SCHEMA = """
name: "lmx/sentencepiece_model.proto" package: "lmx" syntax: "proto2"
message_type {
  name: "Piece"
  field { name: "piece" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "score" number: 2 label: LABEL_OPTIONAL type: TYPE_FLOAT }
  field { name: "type" number: 3 label: LABEL_OPTIONAL type: TYPE_INT32 default_value: "1" }
}
message_type {
  name: "Trainer"
  field { name: "model_type" number: 3 label: LABEL_OPTIONAL type: TYPE_INT32 default_value: "1" }
  field { name: "byte_fallback" number: 35 label: LABEL_OPTIONAL type: TYPE_BOOL }
  field { name: "unk_id" number: 40 label: LABEL_OPTIONAL type: TYPE_INT32 }
}
message_type {
  name: "Normalizer"
  field { name: "precompiled_charsmap" number: 2 label: LABEL_OPTIONAL type: TYPE_BYTES }
}
message_type {
  name: "Model"
  field { name: "pieces" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".lmx.Piece" }
  field { name: "trainer_spec" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".lmx.Trainer" }
  field { name: "normalizer_spec" number: 3 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".lmx.Normalizer" }
}
"""


def published_json(path: Path, model_type: str, config: Mapping[str, Any]) -> str:
    """The tokenizer.json of a published model: T5's unigrams (with its sentinels) or Llama's byte pairs.

    Args:
      path: the model's file.
      model_type: of ``config.json``.
      config: ``tokenizer_config.json``.

    Raises:
      DataError: the file is no SentencePiece model.
    """
    model = _parsed(path.read_bytes(), path.name)
    tokenizers = library()
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    names = [piece for piece, _ in pieces]
    control = [piece.piece for piece in model.pieces if piece.type == CONTROL]
    unknown = names[model.trainer_spec.unk_id]
    if model.trainer_spec.model_type == BPE:
        return llama_json(pieces, control, unknown, config)
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.Unigram(pieces, model.trainer_spec.unk_id, model.trainer_spec.byte_fallback)
    )
    if model.normalizer_spec.precompiled_charsmap:
        tokenizer.normalizer = tokenizers.normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    spaces = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = spaces.Sequence(
        [spaces.WhitespaceSplit(), spaces.Metaspace(SPACE, prepend_scheme="always")]
    )
    tokenizer.decoder = tokenizers.decoders.Metaspace(SPACE, prepend_scheme="always")
    eos = "</s>"
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        ["$A", eos], ["$A", eos, "$B", eos], [(eos, names.index(eos))]
    )
    extra = check_sentinels(config.get("extra_ids", 100 if model_type in ("t5", "switch_transformers") else 0))
    tokenizer.add_special_tokens([*control, unknown])
    if not sentinels(dict(zip(names, range(len(names)), strict=True))):
        tokenizer.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(extra))])
    return tokenizer.to_str()


def trained_json(model: bytes, sentinel_ids: Sequence[int], lowercase: bool) -> str:
    """The tokenizer.json of a model that :class:`~lmx.text.subwords.SentencePieceTokenizer` trained.

    It gives the same ids, but for what the library does otherwise: names of special tokens in a text are read as such,
    a text's own U+2581 as a space, and between cuts that are equally likely (of a row of dashes) rounding decides.

    Args:
      model: the serialized model.
      sentinel_ids: of ``<extra_id_0>``, ``<extra_id_1>``, …, among its pieces or above them.
      lowercase: texts are lower-cased first.

    Raises:
      LmxError: a package that writes it is not installed.
    """
    proto, tokenizers = _parsed(model, "the tokenizer"), library()
    pieces = [(piece.piece, piece.score if piece.type == NORMAL else NEVER) for piece in proto.pieces]
    spec = proto.trainer_spec
    if spec.model_type == BPE:
        normal = {piece.piece for piece in proto.pieces if piece.type == NORMAL}
        ids = {name: i for i, (name, _) in enumerate(pieces)}
        merges = _merges([(name, score) for name, score in pieces if name in normal], ids)
        unknown = pieces[spec.unk_id][0]
        fallback = spec.byte_fallback
        kind = tokenizers.models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback)
    else:
        kind = tokenizers.models.Unigram(pieces, spec.unk_id, spec.byte_fallback)
    tokenizer = tokenizers.Tokenizer(kind)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), spaces]) if lowercase else spaces
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace(SPACE, " ")])
    tokenizer.add_tokens([tokenizers.AddedToken(symbol, normalized=False) for symbol in LINE_SYMBOLS])
    special = [piece.piece for piece in proto.pieces if piece.type in (CONTROL, UNKNOWN)]
    above = sorted((token, f"<extra_id_{i}>") for i, token in enumerate(sentinel_ids) if token >= len(pieces))
    tokenizer.add_special_tokens([*special, *(name for _, name in above)])
    return tokenizer.to_str()


def llama_json(pieces: Pieces, control: Sequence[str], unknown: str, config: Mapping[str, Any]) -> str:
    """The tokenizer.json of Llama's byte pairs.

    Args:
      pieces: names and scores in the order of their ids.
      control: names of special tokens.
      unknown: name of the unknown token.
      config: ``tokenizer_config.json``.
    """
    tokenizers, ids = library(), {piece: i for i, (piece, _) in enumerate(pieces)}
    merges = _merges([(piece, score) for piece, score in pieces if piece not in control], ids)
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    scheme = "always" if config.get("legacy", False) else "first"
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([unknown, *control])
    bos = "<s>"
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        [bos, "$A"], [bos, "$A", f"{bos}:1", "$B:1"], [(bos, ids[bos])]
    )
    return tokenizer.to_str()


def _merges(pieces: Pieces, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs of pieces that make a piece, the best scores first."""
    merges = []
    for piece, score in pieces:
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in ids and piece[i:] in ids]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [(score, pair) for pair in pairs]
    merges.sort(key=lambda merge: -merge[0])
    return [pair for _, pair in merges]


def _parsed(model: bytes, name: str) -> Any:
    """The model as a protocol buffer."""
    try:
        from google.protobuf.message import DecodeError

        formats = _schema()
    except ImportError:
        raise missing_extra("protobuf", "hf", f"{name}, a SentencePiece model") from None
    try:
        return formats.FromString(model)
    except DecodeError as error:
        raise DataError(f"{name} is not a SentencePiece model: {error}.") from None


@functools.cache
def _schema() -> Any:
    """The message ``ModelProto`` of ``sentencepiece_model.proto``, of it what is read here.

    SentencePiece brings this class, but made for one version of protobuf: 0.2.3 refuses all below 7.36, which Beam and
    TensorFlow do not let in.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    file = text_format.Parse(SCHEMA, descriptor_pb2.FileDescriptorProto())
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("lmx.Model"))
