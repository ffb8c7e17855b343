"""From ``--config FILE.py:VARIANT --config.section.field=VALUE …`` to a checked :class:`~lmx.config.Config`."""

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from lmx.config import Config, field_types, from_config_dict
from lmx.errors import ConfigError, nearest


def read_config_file(path: str, overrides: Sequence[str] = ()) -> Config:
    """Runs ``get_config(variant)`` of an experiment file and applies overrides.

    Args:
      path: ``experiments/gpt2.py`` or ``experiments/gpt2.py:124m``.
      overrides: flags as given, ``--config.train.steps=1000``.

    Raises:
      ConfigError: no such file, not an experiment, an unknown field (it names the nearest) or a bad value.
    """
    file = Path(path.split(":", 1)[0] if ".py:" in path else path)
    if not file.is_file():
        others = sorted(other.name for other in Path(file.parent).glob("*.py")) if file.parent.is_dir() else []
        raise ConfigError(f"--config: there is no file {file}{nearest(file.name, others) if others else ''}")
    for override in overrides:
        _check_name(override)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    try:
        values(["lmx", f"--config={path}", *overrides])
        found = values["config"].value
    except flags.Error as error:
        raise ConfigError(f"--config {path}: {_first_line(error)}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--config {path}: {_first_line(error)}") from error
    return from_config_dict(found)


def describe_fields() -> str:
    """Every field with its type, default and meaning, a line each: the text of ``--help-config``."""
    lines = []
    for name, field in field_types().items():
        kind = getattr(field.type, "__name__", str(field.type)) if isinstance(field.type, type) else str(field.type)
        choices = f" One of {', '.join(field.metadata['choices'])}." if field.metadata["choices"] else ""
        default = f"{field.default!r}" if field.default is not dataclasses.MISSING else ""
        lines.append(f"--config.{name}  ({kind}, {default})\n    {field.metadata['meaning']}{choices}")
    return "\n".join(lines)


def describe_file(path: str) -> str:
    """The lab note of an experiment file."""
    source = Path(path).read_text(encoding="utf-8")
    return inspect.cleandoc(compile(source, path, "exec").co_consts[0] or "")


def _check_name(override: str) -> None:
    """ml_collections would report an unknown field as a bare AttributeError."""
    name = override.removeprefix("--config.").split("=", 1)[0]
    if not override.startswith("--config.") or "=" not in override:
        raise ConfigError(f"{override!r} is no override; write --config.SECTION.FIELD=VALUE.")
    if name not in field_types():
        raise ConfigError(f"config has no field {name!r}{nearest(name, field_types())}")


def _first_line(error: Exception) -> str:
    return str(error).strip().strip("'\"")
