"""Sub-word tokenizers: SentencePiece, trained here or elsewhere, and the files of the ``tokenizers`` library."""

import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lmx import config as schema
from lmx.errors import ConfigError, DataError, damage_is, located, missing_extra
from lmx.paths import is_lfs_pointer
from lmx.text.tokenizers import SPECIALS, Tokenizer, check_sentinels

MODEL_FILE = "spiece.model"
LONGEST_SENTENCE = 1000  # characters; the trainer throws away sentences beyond a limit, so long lines are cut
LONG_LINE = 1 << 14  # characters encoded at once
MOST_IDS = 1 << 24  # tables of all ids are made

SPACE = "\u2581"  # SentencePiece writes a space so, and would read this character in a text as a space
LINE_SYMBOLS = ("\n", "\t")  # each its own piece: newlines stay, and tabs would make the trainer skip the line


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece (Kudo and Richardson 2018), unigram (Kudo 2018) or byte-pair encoding (Sennrich et al. 2016).

    One trained here normalizes nothing, and with byte fallback decodes to the very text that was encoded.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, num_sentinels: int = 0, lowercase: bool = False):
        """Opens a model.

        Args:
          model: a serialized SentencePiece model.
          num_sentinels: sentinels wanted; the model's own ``<extra_id_…>`` pieces, or, where it has none, ids above
            its pieces in the order of T5's published vocabulary (``<extra_id_0>`` last).
          lowercase: lower-case text first.

        Raises:
          DataError: the bytes are no SentencePiece model.
        """
        from sentencepiece import SentencePieceProcessor

        self._model = model
        try:
            self._pieces = pieces = SentencePieceProcessor(model_proto=model)
        except (RuntimeError, UnicodeDecodeError) as error:  # its own errors quote pieces, which may be no text
            raise DataError(f"this is not a SentencePiece model: {error}") from error
        self.lowercase = lowercase
        with damage_is(DataError, "the SentencePiece model"):
            self._read_pieces(pieces, check_sentinels(num_sentinels))

    def _read_pieces(self, pieces: Any, num_sentinels: int) -> None:
        size = self.vocab_size = pieces.vocab_size()
        names = {pieces.id_to_piece(i): i for i in range(size)}
        self.pad_id, self.bos_id, self.eos_id, self.unk_id = (
            i if i >= 0 else None for i in (pieces.pad_id(), pieces.bos_id(), pieces.eos_id(), pieces.unk_id())
        )
        self.mask_id = names.get("<mask>", names.get("[MASK]"))
        self.cls_id = names.get("[CLS]", self.bos_id)
        self.sep_id = names.get("[SEP]", self.eos_id)
        self.sentinel_ids = sentinels(names)
        if not self.sentinel_ids and num_sentinels:
            self.sentinel_ids = tuple(range(size + num_sentinels - 1, size - 1, -1))
            self.vocab_size += num_sentinels
        controls = (i for i in range(size) if pieces.is_control(i) or pieces.is_unknown(i))
        self.special_ids = frozenset([*controls, *self.sentinel_ids])
        self._ours = tuple(map(pieces.id_to_piece, range(len(SPECIALS)))) == SPECIALS
        self._space = [pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()] if self._ours else []

    @classmethod
    def train(cls, texts: Iterable[str], config: schema.Tokenizer) -> "SentencePieceTokenizer":
        """Trains on the texts; the same texts and configuration give the same model.

        Raises:
          DataError: ``config.vocab_size`` is larger than the text can fill, or too small for its characters.
        """
        from sentencepiece import SentencePieceTrainer

        model = io.BytesIO()
        pad, bos, eos, unk, mask = SPECIALS
        try:
            SentencePieceTrainer.train(
                sentence_iterator=_sentences(texts, config.lowercase),
                model_writer=model,
                vocab_size=config.vocab_size,
                model_type=config.model_type,
                byte_fallback=config.byte_fallback,
                character_coverage=0.9995 if config.byte_fallback else 1.0,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                pad_id=0,
                bos_id=1,
                eos_id=2,
                unk_id=3,
                pad_piece=pad,
                bos_piece=bos,
                eos_piece=eos,
                unk_piece=unk,
                control_symbols=[mask, *(f"<extra_id_{i}>" for i in range(config.num_sentinels))],
                user_defined_symbols=list(LINE_SYMBOLS),
                max_sentence_length=4 * LONGEST_SENTENCE + 1,  # in bytes
                num_threads=1,  # several would add up in another order each time
                minloglevel=2,
            )
        except RuntimeError as error:
            raise _training_error(error, config) from error
        return cls(model.getvalue(), config.num_sentinels, config.lowercase)

    @classmethod
    def load(cls, folder: Path, num_sentinels: int, lowercase: bool) -> "SentencePieceTokenizer":
        """Opens what ``save`` wrote."""
        return cls((folder / MODEL_FILE).read_bytes(), num_sentinels, lowercase)

    def _encode_batch(self, texts):
        if not self._ours:
            return [np.array(ids, np.int32) for ids in self._pieces.encode(list(texts))]
        parts, counts = [], []
        for text in texts:
            parts_of_text = _parts(text)
            parts += parts_of_text
            counts.append(len(parts_of_text))
        encoded = iter(self._pieces.encode([part for part in parts if part != SPACE]))
        ids = [self._space_ids() if part == SPACE else next(encoded) for part in parts]
        ends = np.cumsum([0, *map(len, ids)])
        joined = np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(ends[-1]))
        return np.split(joined, ends[np.cumsum(counts)[:-1]]) if counts else []

    def _space_ids(self) -> list[int]:
        unknown = self.unk_id in self._space  # no byte fallback
        return [self.unk_id] if unknown else self._space

    def _decode(self, ids):
        return self._pieces.decode([i for i in ids if i < self._pieces.vocab_size()])

    def _surfaces(self):
        size = self._pieces.vocab_size()
        surfaces = [_sentence_piece_surface(self._pieces.id_to_piece(i)) for i in range(size)]
        return surfaces + [""] * (self.vocab_size - size)

    def _files(self):
        return {MODEL_FILE: self._model}, {"num_sentinels": len(self.sentinel_ids)}

    def _published(self):
        if not self._ours:
            return super()._published()  # how it is framed and normalized is known to whoever trained it
        from lmx.text.sentence_pieces import trained_json

        serialized = trained_json(self._model, self.sentinel_ids, self.lowercase)
        return {"tokenizer.json": serialized.encode(), "tokenizer_config.json": self._settings_file()}


class FileTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the ``tokenizers`` library, or BERT's ``vocab.txt`` (WordPiece).

    As that library has it, special tokens that stand in a text are read as such.
    """

    kind = "file"

    _ROLES = {
        "pad_id": ("[PAD]", "<pad>"),
        "bos_id": ("<s>", "<|startoftext|>", "<|endoftext|>", "[CLS]"),
        "eos_id": ("</s>", "<|endoftext|>", "[SEP]"),
        "unk_id": ("[UNK]", "<unk>"),
        "mask_id": ("[MASK]", "<mask>"),
        "cls_id": ("[CLS]", "<s>"),
        "sep_id": ("[SEP]", "</s>"),
    }

    def __init__(self, serialized: str, num_sentinels: int = 0):
        """Opens a tokenizer.

        Args:
          serialized: the content of a ``tokenizer.json``.
          num_sentinels: sentinels to add above the vocabulary where it has no ``<extra_id_…>`` of its own.

        Raises:
          DataError: the text is no ``tokenizer.json``.
          LmxError: the package tokenizers is not installed.
        """
        tokenizers = library()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(serialized)
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"this is not a tokenizer.json of the tokenizers library: {error}") from error
        with damage_is(DataError, "the tokenizer.json"):
            self._read_vocabulary(check_sentinels(num_sentinels))

    def _read_vocabulary(self, num_sentinels: int) -> None:
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if num_sentinels and not sentinels(self._tokenizer.get_vocab()):
            self._tokenizer.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(num_sentinels))])
        names = self._tokenizer.get_vocab()
        self.vocab_size = max(names.values()) + 1
        if self.vocab_size > MOST_IDS:
            raise DataError(f"the tokenizer.json has an id of {self.vocab_size - 1:,}, which no vocabulary has.")
        for role, candidates in self._ROLES.items():
            setattr(self, role, next((names[name] for name in candidates if name in names), None))
        self.sentinel_ids = sentinels(names)
        roles = [i for i in (getattr(self, role) for role in self._ROLES) if i is not None]
        added = [i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special]
        self.special_ids = frozenset([*roles, *added, *self.sentinel_ids])

    @classmethod
    def open(cls, path: Path, config: schema.Tokenizer) -> "FileTokenizer":
        """Opens a tokenizer.json, a vocab.txt, or a folder that holds one of them."""
        if path.is_dir():
            found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).exists()]
            if not found:
                raise DataError(f"tokenizer.path: the folder {path} holds neither tokenizer.json nor vocab.txt.")
            path = found[0]
        with located(path), damage_is(DataError, "the tokenizer"):
            return cls._open_file(path, config)

    @classmethod
    def _open_file(cls, path: Path, config: schema.Tokenizer) -> "FileTokenizer":
        if path.suffix == ".json":
            if config.lowercase:
                raise ConfigError(f"{path} has its own normalization: leave tokenizer.lowercase at False.")
            return cls(read_text(path), config.num_sentinels)
        return cls(_word_piece(path, config.lowercase), config.num_sentinels)

    @classmethod
    def load(cls, folder: Path, lowercase: bool) -> "FileTokenizer":
        """Opens what ``save`` wrote."""
        return cls(read_text(folder / "tokenizer.json"))

    def _encode_batch(self, texts):
        with damage_is(DataError, "the tokenizer"):  # it may lack the token that it has for what is unknown
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encoded]

    def _decode(self, ids):
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _surfaces(self):
        surfaces = [""] * self.vocab_size
        pieces = self._tokenizer.get_vocab()
        if any(piece.startswith("##") for piece in pieces):  # WordPiece marks what goes on in a word
            spell = _word_piece_surface
        elif any(piece.startswith("Ġ") for piece in pieces):
            spell = _byte_level_surface
        else:
            spell = _sentence_piece_surface
        for piece, i in pieces.items():
            surfaces[i] = spell(piece)
        return surfaces

    def _files(self):
        return {"tokenizer.json": self._tokenizer.to_str().encode()}, {}

    def _published(self):
        names = {i: name for name, i in self._tokenizer.get_vocab().items()}
        roles = {role.replace("_id", "_token"): names.get(getattr(self, role)) for role in self._ROLES}
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | {role: name for role, name in roles.items() if name}
        return self._files()[0] | {"tokenizer_config.json": json.dumps(config, indent=2).encode()}


def library() -> Any:
    """The package ``tokenizers``; an LmxError that names the extra where it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise missing_extra("tokenizers", "hf", "a tokenizer file") from None
    return tokenizers


def _sentence_piece_surface(piece: str) -> str:
    return re.sub(r"<0x[0-9A-F]{2}>", "x", piece).replace(SPACE, " ")


def _word_piece_surface(piece: str) -> str:
    return piece[2:] if piece.startswith("##") and len(piece) > 2 else f" {piece}"


def _byte_level_surface(piece: str) -> str:
    """GPT-2's alphabet of bytes; those from 0x80 on are parts of letters more often than not."""
    spaces = {"Ġ": " ", "Ċ": "\n", "ĉ": "\t", "č": "\r"}
    return "".join(spaces.get(character, character if character.isascii() else "x") for character in piece)


def sentinels(names: dict[str, int]) -> tuple[int, ...]:
    """The ids of ``<extra_id_0>``, ``<extra_id_1>``, …, as far as they are there."""
    found = []
    while (i := names.get(f"<extra_id_{len(found)}>")) is not None:
        found.append(i)
    return tuple(found)


def _sentences(texts: Iterable[str], lowercase: bool) -> Iterator[str]:
    """Lines to train on, without the symbols that are pieces of their own, none of them too long."""
    for text in texts:
        for line in re.split(f"[{''.join(LINE_SYMBOLS)}]", text.lower() if lowercase else text):
            for start in range(0, len(line), LONGEST_SENTENCE):
                yield line[start : start + LONGEST_SENTENCE]


def _parts(text: str) -> list[str]:
    """The lines of a text, cut around U+2581 and, where very long, before words; their ids joined are the text's.

    SentencePiece takes time and memory for the longest text. And where two ways to cut a line are equally likely, as
    of a row of dashes, its rounding takes one or the other by what stands before: here a line is always the same.
    """
    parts = re.findall(f"{SPACE}|[^{SPACE}\n]*\n|[^{SPACE}\n]+", text)
    return [piece for part in parts for piece in ([part] if len(part) <= LONG_LINE else _cut(part))]


def _cut(line: str) -> Iterator[str]:
    start = 0
    while len(line) - start > LONG_LINE:
        boundary = re.compile(r"\S(?= )").search(line, start + LONG_LINE)  # no piece reaches from a letter into a space
        if boundary is None:
            break
        yield line[start : boundary.end()]
        start = boundary.end()
    yield line[start:]


def _training_error(error: RuntimeError, config: schema.Tokenizer) -> DataError:
    asked = f"tokenizer.vocab_size={config.vocab_size}"
    if too_high := re.search(r"Please set it to a value <= (\d+)", str(error)):
        most = too_high[1]
        return DataError(
            f"{asked} is more than the training text can fill: the largest possible is {most}. Set "
            f"tokenizer.vocab_size={most} or less, or train on more text."
        )
    if too_small := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
        least = too_small[1]
        return DataError(
            f"{asked} is less than the special tokens, bytes and characters need: set tokenizer.vocab_size to at least "
            f"{least}."
        )
    if "sentences_.empty()" in str(error):
        return DataError("there is no text to train the tokenizer on: the training source is empty.")
    return DataError(f"SentencePiece could not train with {asked}: {error}")


def read_text(path: Path) -> str:
    """The content of a UTF-8 file; a DataError with the offset where it is not."""
    if is_lfs_pointer(path):
        raise DataError(f"{path} is a note of Git LFS and not the file itself; fetch it with `git lfs pull`.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: offset {error.start:,}.") from None


def _word_piece(path: Path, lowercase: bool) -> str:
    """The tokenizer.json of BERT's vocab.txt: a piece a line, its id the line's number from 0."""
    pieces = read_text(path).removesuffix("\n").split("\n")
    vocabulary = {piece.rstrip("\r"): i for i, piece in enumerate(pieces)}
    if len(vocabulary) < len(pieces):
        raise DataError(f"{path} is not a vocab.txt: {len(pieces) - len(vocabulary)} of its lines are there twice.")
    missing = [name for name in ("[UNK]", "[CLS]", "[SEP]") if name not in vocabulary]
    if missing:
        raise DataError(f"{path} is not BERT's vocab.txt: it has no line {', '.join(missing)}.")
    return library().BertWordPieceTokenizer(vocabulary, lowercase=lowercase).to_str()
