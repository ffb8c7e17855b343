"""Our tokenizers of bytes and characters as the ``tokenizer.json`` of the ``tokenizers`` library."""

from collections.abc import Sequence
from typing import Any

from lmx.text.subwords import library
from lmx.text.tokenizers import SPECIALS


def byte_level_json(first: int, sentinel_ids: Sequence[int], lowercase: bool) -> str:
    """The tokenizer.json of our byte tokenizer: byte pairs without a merge. Bytes have the ids from ``first`` on."""
    tokenizers = library()
    letters = _byte_letters()
    vocabulary = _special_names(sentinel_ids) | {letters[byte]: first + byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return _with_specials(tokenizer, sentinel_ids, lowercase)


def characters_json(characters: str, first: int, sentinel_ids: Sequence[int], lowercase: bool) -> str:
    """The tokenizer.json of our character tokenizer; characters have the ids from ``first`` on."""
    tokenizers = library()
    vocabulary = _special_names(sentinel_ids) | {c: first + i for i, c in enumerate(characters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return _with_specials(tokenizer, sentinel_ids, lowercase)


def _special_names(sentinel_ids: Sequence[int]) -> dict[str, int]:
    names = {name: i for i, name in enumerate(SPECIALS)}
    return names | {f"<extra_id_{i}>": token for i, token in enumerate(sentinel_ids)}


def _with_specials(tokenizer: Any, sentinel_ids: Sequence[int], lowercase: bool) -> str:
    tokenizer.add_special_tokens(list(_special_names(sentinel_ids)))
    if lowercase:
        tokenizer.normalizer = library().normalizers.Lowercase()
    return tokenizer.to_str()


def _byte_letters() -> list[str]:
    """GPT-2's printable character for each byte: itself where it is printable, else one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
