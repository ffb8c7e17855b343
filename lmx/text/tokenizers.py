"""Tokenizers: text to ids and back.

The kinds made here (bytes, characters, trained SentencePiece) begin with the same special tokens, ``<pad>``=0
``<s>``=1 ``</s>``=2 ``<unk>``=3 ``<mask>``=4 and then the sentinels ``<extra_id_0>`` …; none of them can be written
in a text, so that text never turns into control. ``cls`` is ``<s>`` and ``sep`` is ``</s>``.
"""

import abc
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar, SupportsIndex

import numpy as np
from jaxtyping import Bool, Int32

from lmx import config as schema
from lmx.errors import ConfigError, DataError, LmxError, nearest
from lmx.paths import user_path

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
DESCRIPTION = "lmx_tokenizer.json"
MOST_SENTINELS = 100_000

Texts = Callable[[], Iterable[str]]


@dataclasses.dataclass(frozen=True)
class Frame:
    """The special tokens around a text, or around and between two.

    Attributes:
      before, between, after: their ids; ``between`` two texts only.
      types: token types of the two texts; ``before`` counts to the first, ``between`` to the first, ``after`` to the
        last.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    between: tuple[int, ...] = ()
    types: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)

    def around(self, parts: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        """Ids and token types of one text or two."""
        first = [*self.before, *parts[0], *(self.between if len(parts) > 1 else ())]
        last = [*(parts[1] if len(parts) > 1 else ()), *self.after]
        types = self.types if len(parts) > 1 else (self.types[0],) * 2
        return [*first, *last], [types[0]] * len(first) + [types[1]] * len(last)


class Tokenizer(abc.ABC):
    """What every tokenizer has. An id that a vocabulary lacks is None.

    A subclass sets the ids and says how to encode, decode, save, and what each id looks like (the methods at the end).
    """

    kind: ClassVar[str]

    vocab_size: int
    pad_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    mask_id: int | None = None
    cls_id: int | None = None
    sep_id: int | None = None
    sentinel_ids: tuple[int, ...] = ()
    special_ids: frozenset[int] = frozenset()
    lowercase: bool = False

    _boundaries: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a text as it is generated."""
        return () if self.eos_id is None else (self.eos_id,)

    def encode(self, text: str) -> list[int]:
        """The ids of a text; no special tokens are added."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " tokens"]]:
        """The ids of several texts, equal to :meth:`encode` of each and faster where the library below is."""
        return self._encode_batch([text.lower() for text in texts] if self.lowercase else texts)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of ids, without special tokens."""
        return self._decode([int(i) for i in ids if int(i) not in self.special_ids])

    def word_starts(self, ids: Sequence[SupportsIndex] | np.ndarray) -> Bool[np.ndarray, " tokens"]:
        """True where a new word begins, so that ``cumsum`` numbers the words (whole-word masking).

        A word is a run of letters, digits and underscores; every other character and every special token is one by
        itself. The first id begins a word.
        """
        if self._boundaries is None:
            self._boundaries = _word_boundaries(self._surfaces(), self.special_ids)
        begins, ends = self._boundaries
        ids = np.asarray(ids, np.int64)
        starts = begins[ids]
        starts[1:] |= ends[ids[:-1]]
        starts[:1] = True
        return starts

    def frame(self, pair: bool = False) -> Frame:
        """What stands around a text that is read as a whole, or around two of them: BERT's tokens, if there are any."""
        cls, sep = ((() if i is None else (i,)) for i in (self.cls_id, self.sep_id))
        return Frame(cls, sep, sep, (0, 1)) if pair else Frame(cls, sep)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes a folder that :func:`load_tokenizer` opens; each file is written beside its place and renamed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write(self._saved(*self._files()), folder)

    def fingerprint(self) -> str:
        """SHA-256 over what :meth:`save` writes, as far as ids depend on it: equal where tokenizers are."""
        digest = hashlib.sha256()
        for name, content in sorted(self._saved(*self._identity()).items()):
            digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
        return digest.hexdigest()

    def publish(self, folder: Path) -> None:
        """Writes the files that ``transformers`` opens; an LmxError where they cannot say what this tokenizer does."""
        _write(self._published(), folder)

    def _identity(self) -> tuple[dict[str, bytes], dict]:
        """What of :meth:`_files` decides which ids a text has."""
        return self._files()

    def _saved(self, files: dict[str, bytes], description: dict) -> dict[str, bytes]:
        """The files of :meth:`save`; the description last, which makes the folder valid."""
        description = {"kind": self.kind, "lowercase": self.lowercase, **description}
        return {**files, DESCRIPTION: json.dumps(description, ensure_ascii=True, indent=1).encode()}

    def _set_specials(self, num_sentinels: int) -> int:
        """Gives the special tokens of our own kinds their ids; returns the first id after them."""
        self.pad_id, self.bos_id, self.eos_id, self.unk_id, self.mask_id = range(len(SPECIALS))
        self.cls_id, self.sep_id = self.bos_id, self.eos_id
        first = len(SPECIALS) + check_sentinels(num_sentinels)
        self.sentinel_ids = tuple(range(len(SPECIALS), first))
        self.special_ids = frozenset(range(first))
        return first

    def _published(self) -> dict[str, bytes]:
        """The files of :meth:`publish`, by name."""
        raise LmxError(f"a tokenizer of kind {self.kind!r} cannot be written for transformers; save with format='lmx'.")

    def _settings_file(self) -> bytes:
        """``tokenizer_config.json`` for a ``tokenizer.json`` with our special tokens."""
        roles = {"pad": self.pad_id, "bos": self.bos_id, "eos": self.eos_id, "unk": self.unk_id, "mask": self.mask_id}
        roles |= {"cls": self.cls_id, "sep": self.sep_id}
        names = {f"{role}_token": SPECIALS[i] for role, i in roles.items() if i is not None}
        return json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | names, indent=2).encode()

    @abc.abstractmethod
    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of texts that are lower-cased already where that was asked."""

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of ids none of which is special."""

    @abc.abstractmethod
    def _surfaces(self) -> list[str]:
        """What each id stands for, with a space before it where it begins a word after one."""

    @abc.abstractmethod
    def _files(self) -> tuple[dict[str, bytes], dict]:
        """Files to save by name, and what the description must say beside the kind."""


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes after the special tokens: no training, and no text is unknown (ByT5, Xue et al. 2022)."""

    kind = "bytes"

    def __init__(self, num_sentinels: int = 0, lowercase: bool = False):
        self._first = self._set_specials(num_sentinels)
        self.vocab_size = self._first + 256
        self.lowercase = lowercase

    def _encode_batch(self, texts):
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) + self._first for text in texts]

    def _decode(self, ids):
        return bytes(i - self._first for i in ids if i < self.vocab_size).decode(errors="replace")

    def _surfaces(self):
        # Bytes from 0x80 on are parts of letters more often than not.
        return [""] * self._first + [chr(b) if b < 0x80 else "x" for b in range(256)]

    def _files(self):
        return {}, {"num_sentinels": len(self.sentinel_ids)}

    def _published(self):
        from lmx.text.plain_json import byte_level_json

        return {
            "tokenizer.json": byte_level_json(self._first, self.sentinel_ids, self.lowercase).encode(),
            "tokenizer_config.json": self._settings_file(),
        }


class CharacterTokenizer(Tokenizer):
    """The characters of the training text in code-point order after the special tokens; others are ``<unk>``."""

    kind = "characters"

    def __init__(self, characters: str, num_sentinels: int = 0, lowercase: bool = False):
        self._first = self._set_specials(num_sentinels)
        if not characters:
            raise DataError("there is no text to take the vocabulary from: the training source is empty.")
        self.characters = "".join(sorted(set(characters)))
        self._codes = _code_points(self.characters)
        self.vocab_size = self._first + len(self.characters)
        self.lowercase = lowercase

    @classmethod
    def train(cls, texts: Iterable[str], num_sentinels: int = 0, lowercase: bool = False) -> "CharacterTokenizer":
        """Takes the characters of all the texts."""
        seen: set[str] = set()
        for text in texts:
            seen.update(text.lower() if lowercase else text)
        return cls("".join(seen), num_sentinels, lowercase)

    def _encode_batch(self, texts):
        return [self._lookup(_code_points(text)) for text in texts]

    def _lookup(self, codes: np.ndarray) -> np.ndarray:
        found = np.searchsorted(self._codes, codes)
        known = self._codes[np.minimum(found, len(self._codes) - 1)] == codes
        return np.where(known, found + self._first, self.unk_id).astype(np.int32)

    def _decode(self, ids):
        return "".join(self.characters[i - self._first] for i in ids if i < self.vocab_size)

    def _surfaces(self):
        return [""] * self._first + list(self.characters)

    def _files(self):
        return {}, {"characters": self.characters, "num_sentinels": len(self.sentinel_ids)}

    def _published(self):
        from lmx.text.plain_json import characters_json

        return {
            "tokenizer.json": characters_json(self.characters, self._first, self.sentinel_ids, self.lowercase).encode(),
            "tokenizer_config.json": self._settings_file(),
        }


def make_tokenizer(config: schema.Tokenizer, texts: Texts) -> Tokenizer:
    """The tokenizer that a configuration asks for: opened from ``config.path`` if given, else made from the texts.

    Args:
      config: the tokenizer section.
      texts: called once, if training is needed, for the training texts; at most ``config.training_characters`` of
        them are read.

    Raises:
      ConfigError: kind "file" without a path, or a path that the kind does not open.
      DataError: a file that is missing or damaged, no text to train on, or a vocabulary that does not fit the text.
      LmxError: kind "file" without the package tokenizers.
    """
    if config.path:
        return _open_path(config)
    if config.kind in ("file", "published"):
        raise ConfigError(
            f"tokenizer.kind={config.kind!r} needs tokenizer.path: a folder of a published checkpoint, or for 'file' a "
            "tokenizer.json, a vocab.txt or a folder with one."
        )
    if config.kind == "bytes":
        return ByteTokenizer(config.num_sentinels, config.lowercase)
    if config.kind == "characters":
        limited = _limited(texts(), config.training_characters)
        return CharacterTokenizer.train(limited, config.num_sentinels, config.lowercase)
    from lmx.text.subwords import SentencePieceTokenizer

    return SentencePieceTokenizer.train(_limited(texts(), config.training_characters), config)


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Opens a folder that :meth:`Tokenizer.save` wrote; a DataError where it is missing or damaged."""
    path = Path(folder) / DESCRIPTION
    try:
        description = json.loads(path.read_text())
        kind = description.pop("kind")
        if kind == ByteTokenizer.kind:
            return ByteTokenizer(**description)
        if kind == CharacterTokenizer.kind:
            return CharacterTokenizer(**description)
        from lmx.text.published import MissingTokenizer, PublishedTokenizer
        from lmx.text.subwords import FileTokenizer, SentencePieceTokenizer

        kinds = {cls.kind: cls for cls in (SentencePieceTokenizer, FileTokenizer, PublishedTokenizer, MissingTokenizer)}
        if kind in kinds:
            return kinds[kind].load(Path(folder), **description)
    except FileNotFoundError as error:
        raise DataError(f"{folder} is no tokenizer of lmx: there is no {error.filename}.") from None
    except LmxError:
        raise
    except Exception as error:  # of a file that others may have written: of any kind
        raise DataError(f"{path} is damaged: {error!r}. Save the tokenizer again.") from error
    raise DataError(
        f"{path} describes a tokenizer of unknown kind {kind!r}{nearest(str(kind), [*kinds, 'bytes', 'characters'])}"
    )


def _open_path(config: schema.Tokenizer) -> Tokenizer:
    path = user_path(config.path)
    if (path / DESCRIPTION).exists():
        tokenizer = load_tokenizer(path)
        if tokenizer.kind != config.kind:
            raise ConfigError(
                f"tokenizer.kind is {config.kind!r}, but {path} holds one of kind {tokenizer.kind!r}; set "
                "tokenizer.kind to that, or another tokenizer.path."
            )
        return tokenizer
    if not path.exists():
        raise DataError(f"tokenizer.path: there is no {str(path)!r}, seen from {os.getcwd()}.")
    from lmx.text.subwords import FileTokenizer, SentencePieceTokenizer

    if config.kind == "file":
        return FileTokenizer.open(path, config)
    if config.kind == "published" and path.is_dir():
        from lmx.text.published import PublishedTokenizer

        return PublishedTokenizer.open(path)
    if config.kind == "sentencepiece" and path.is_file():
        return SentencePieceTokenizer(path.read_bytes(), config.num_sentinels, config.lowercase)
    raise ConfigError(
        f"tokenizer.kind={config.kind!r} does not open {str(path)!r}; it takes a folder with {DESCRIPTION}"
        + (" or a SentencePiece model file." if config.kind == "sentencepiece" else ", or no path at all.")
    )


def _write(files: dict[str, bytes], folder: Path) -> None:
    """Writes each file beside its place, then renames it."""
    for name, content in files.items():
        beside = folder / f"{name}.tmp"
        beside.write_bytes(content)
        beside.replace(folder / name)


def check_sentinels(count: int) -> int:
    """The count, where it is one; a DataError otherwise."""
    if type(count) is not int or not 0 <= count <= MOST_SENTINELS:
        raise DataError(f"tokenizer.num_sentinels must be between 0 and {MOST_SENTINELS:,}, not {count!r:.99}.")
    return count


def _limited(texts: Iterable[str], characters: int) -> Iterable[str]:
    """The texts, up to so many characters."""
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _word_boundaries(surfaces: Sequence[str], special_ids: frozenset[int]) -> tuple[np.ndarray, np.ndarray]:
    """For every id, whether a word begins with it, and whether one begins after it."""

    def inside(character: str) -> bool:
        return character.isalnum() or character == "_"

    special = np.isin(np.arange(len(surfaces)), list(special_ids))
    begins = np.array([not (surface and inside(surface[0])) for surface in surfaces]) | special
    ends = np.array([not (surface and inside(surface[-1])) for surface in surfaces]) | special
    return begins, ends
