"""What the command line says of a preparation or of what to show, as settings."""

import argparse
import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

from rich.console import Console

from lmx.config import Config, Tokenizer
from lmx.errors import ConfigError
from lmx.paths import user_path
from lmx.preparation.beam import beam_runner
from lmx.preparation.cleaning import chosen_steps
from lmx.preparation.documents import Reading
from lmx.preparation.prepare import prepare
from lmx.preparation.shards import Settings
from lmx.text.corpora import open_source
from lmx.text.prepared import TOKENIZER
from lmx.text.tokenizers import DESCRIPTION, load_tokenizer

KINDS_WITHOUT_FILES = ("bytes", "characters")


def tokenizer_section(named: str | None, config: Config | None) -> Tokenizer:
    """The tokenizer that ``--tokenizer`` names, or that a config does; bytes where neither is given.

    Args:
      named: ``bytes``, ``characters``, or a path: a folder of ours or of a published checkpoint, a ``tokenizer.json``,
        a ``vocab.txt`` or a SentencePiece model.
      config: of ``--config``.

    Raises:
      ConfigError: the path is not there, or both are given and differ in what they say.
    """
    if named is None:
        return config.tokenizer if config else Tokenizer()
    if named in KINDS_WITHOUT_FILES:
        return Tokenizer(kind=named)
    path = user_path(named)
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


def prepare_from(args: argparse.Namespace, config: Config | None, console: Console) -> None:
    """Runs ``lmx data prepare`` as its flags say.

    Raises:
      LmxError: a flag cannot be followed, or whatever :func:`lmx.preparation.prepare.prepare` raises.
    """
    field = args.field or (config.data.text_field if config else "text")
    settings = Settings(
        sources=tuple(args.source),
        reading=Reading(field, args.documents, args.unreadable),
        steps=chosen_steps(args.steps),
        min_words=args.min_words,
        duplicates=args.duplicates,
        similarity=args.similarity,
        validation=args.validation,
        part_bytes=round(args.part_megabytes * 10**6),
    )
    runner = beam_runner(args.runner, args.runner_option) if args.runner else None
    if args.processes < 1:
        raise ConfigError(f"--processes must be at least 1, not {args.processes}.")
    section = tokenizer_section(args.tokenizer, config)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        prepare(settings, section, args.output, console, args.processes, runner)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from what is done.", highlight=False)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: Any) -> None:
    """SIGTERM ends the work as Ctrl-C does: parts under way are done to their end, and nothing is left behind."""
    raise KeyboardInterrupt(number)


def config_to_inspect(config: Config | None, source: str | None, tokenizer: str | None) -> Config:
    """The config whose examples are shown: next-token prediction where none is given.

    Raises:
      LmxError: there is neither a config nor a source, or the tokenizer cannot be opened.
    """
    if config is None and source is None:
        raise ConfigError("lmx data inspect needs --config, --source or both; see `lmx data inspect --help`.")
    section = tokenizer_section(tokenizer, config)
    if config is None and tokenizer is None and "prepared:" in source:
        for prepared in filter(None, (part.prepared for part in open_source(source).sources)):
            section = tokenizer_section(str(prepared.folder / TOKENIZER), None)
    config = dataclasses.replace(config or Config(), tokenizer=section)
    return config.replace(data={"train": source}) if source else config
