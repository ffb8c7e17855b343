"""Errors that are for the reader: what was asked, what was found, what to do.

Everything a user can get wrong raises an :class:`LmxError`. The command line prints its text as one
paragraph and exits with status 2; any other exception is a defect of lmx and keeps its traceback.
"""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class LmxError(ValueError):
    """Something the user can mend. The message says what was asked, what was found and what to do."""


class ConfigError(LmxError):
    """A field of the configuration is unknown, mistyped, out of range or at odds with another."""


class DataError(LmxError):
    """A corpus, a record or a tokenizer file is missing, empty or malformed."""


class CheckpointError(LmxError):
    """A working directory or a checkpoint is missing, damaged or belongs to another configuration."""


class TrainingError(LmxError):
    """Training cannot go on: the loss is no longer finite, or the hardware cannot hold the run."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the known name closest to ``name``, or the whole list."""
    return suggestion(name, known := list(known)) or f"; known: {', '.join(sorted(known))}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the known name closest to ``name``, if any is close."""
    known, leaf = sorted(known), name.rsplit(".", 1)[-1]
    elsewhere = [other for other in known if other.rsplit(".", 1)[-1] == leaf]  # `optimizer.steps` is `train.steps`
    matches = difflib.get_close_matches(name, elsewhere or known, n=1, cutoff=0.0 if elsewhere else 0.5)
    if not matches:  # misspelt and in the wrong section: compare the last words alone
        last = {other.rsplit(".", 1)[-1]: other for other in known}
        matches = [last[m] for m in difflib.get_close_matches(leaf, last, n=1, cutoff=0.6)]
    return f"; did you mean {matches[0]!r}?" if matches else ""


def missing_extra(package: str, extra: str, purpose: str) -> LmxError:
    """The error for an optional package that is not installed."""
    return LmxError(f"{purpose} needs the package {package!r}, which is not installed. Run: pip install 'lmx[{extra}]'")


@contextlib.contextmanager
def located(where: object) -> Iterator[None]:
    """Puts the place, a file or a folder, before what an error for the reader says."""
    try:
        yield
    except LmxError as error:
        raise type(error)(f"{where}: {error}") from error


@contextlib.contextmanager
def damage_is(kind: type[LmxError], what: str) -> Iterator[None]:
    """Turns whatever a library raises about a file that others wrote into an error for the reader.

    Args:
      kind: the error.
      what: the file, as the message begins.
    """
    try:
        yield
    except LmxError:
        raise
    except BaseException as error:
        # A library written in Rust panics with an exception that is none of Python's.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).strip().splitlines() or [""])[-1][:200]
        raise kind(f"{what} is damaged or not supported ({type(error).__name__}: {reason}).") from error
