"""What the command line says of a preparation, as settings."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from lmx.config import Config, Tokenizer
from lmx.errors import ConfigError
from lmx.text.tokenizers import DESCRIPTION, load_tokenizer

KINDS_WITHOUT_FILES = ("bytes", "characters")


def tokenizer_section(named: str | None, config: Config | None) -> Tokenizer:
    """The tokenizer that ``--tokenizer`` names, or that a config does; bytes where neither is given.

    Args:
      named: ``bytes``, ``characters``, or a path: a folder of ours or of a published checkpoint, a ``tokenizer.json``, a
        ``vocab.txt`` or a SentencePiece model.
      config: of ``--config``.

    Raises:
      ConfigError: the path is not there, or both are given and differ in what they say.
    """
    if named is None:
        return config.tokenizer if config else Tokenizer()
    if named in KINDS_WITHOUT_FILES:
        return Tokenizer(kind=named)
    path = Path(named).expanduser()
    if not path.exists():
        known = ", ".join(KINDS_WITHOUT_FILES)
        raise ConfigError(
            f"--tokenizer: there is no {named!r}, seen from {os.getcwd()}; give a path, or one of {known}."
        )
    return Tokenizer(kind=_kind(path), path=named)


def _kind(path: Path) -> str:
    if (path / DESCRIPTION).is_file():
        return load_tokenizer(path).kind
    if path.is_dir():
        return "published"
    return "sentencepiece" if path.suffix == ".model" else "file"


def with_sources(config: Config | None, sources: Sequence[str]) -> Config:
    """A config that reads the first source, for what shows examples of it."""
    config = config or Config()
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train=sources[0])) if sources else config
