"""SentencePiece models as the ``tokenizer.json`` of the ``tokenizers`` library, which ``transformers`` reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmx.errors import DataError, missing_extra
from lmx.text.subwords import LINE_SYMBOLS, SPACE, library, sentinels
from lmx.text.tokenizers import check_sentinels

Pieces = Sequence[tuple[str, float]]
NEVER = -1e4  # a score that no way to cut a text has room for


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
    control = [piece.piece for piece in model.pieces if piece.type == piece.CONTROL]
    unknown = names[model.trainer_spec.unk_id]
    if model.trainer_spec.model_type == model.trainer_spec.BPE:
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
    pieces = [(piece.piece, piece.score if piece.type == piece.NORMAL else NEVER) for piece in proto.pieces]
    spec = proto.trainer_spec
    if spec.model_type == spec.BPE:
        normal = {piece.piece for piece in proto.pieces if piece.type == piece.NORMAL}
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
    special = [piece.piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
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
        from sentencepiece import sentencepiece_model_pb2 as formats

        return formats.ModelProto.FromString(model)
    except ImportError:
        raise missing_extra("protobuf", "hf", f"{name}, a SentencePiece model") from None
    except Exception as error:  # protobuf's own kinds
        raise DataError(f"{name} is not a SentencePiece model: {error}.") from None
