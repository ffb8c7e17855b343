"""From ``--config FILE.py:VARIANT --config.section.field=VALUE …`` to a checked :class:`~lmx.config.Config`."""

import ast
import dataclasses
import inspect
import re
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
    values, arguments = flags.FlagValues(), ["lmx", f"--config={path}", *map(_one_text, overrides)]
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=arguments)
    try:
        values(arguments)
        found = values["config"].value
    except ConfigError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(_reason(path, str(error))) from error
    return from_config_dict(found)


def describe_fields() -> str:
    """Every field with its type, default and meaning, a line each: the text of ``--help-config``."""
    lines = []
    for name, field in field_types().items():
        choices = f" One of {', '.join(field.metadata['choices'])}." if field.metadata["choices"] else ""
        lines.append(
            f"--config.{name}  ({_type_name(field)}, {field.default!r})\n    {field.metadata['meaning']}{choices}"
        )
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


def _one_text(override: str) -> str:
    """The override; a single value of a field of several texts becomes one of them, whatever is in it."""
    name, _, value = override.removeprefix("--config.").partition("=")
    if field_types()[name].type != tuple[str, ...]:
        return override
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        found = value
    return override if isinstance(found, tuple | list) else f"--config.{name}={(str(found),)!r}"


def _reason(path: str, message: str) -> str:
    """What a parser's message comes down to."""
    value = re.search(r"flag --config\.([\w.]+)=(.*?): ", message)
    if value and value[1] in field_types():
        field = field_types()[value[1]]
        return f"{value[1]} must be {_type_name(field)}, not {value[2]!r}. {field.metadata['meaning']}"
    last = message.strip().splitlines()[-1]  # of a traceback, where the experiment file itself raised
    return f"--config {path}: " + re.sub(r"^[\w.]*Error: ", "", last)


def _type_name(field: dataclasses.Field) -> str:
    return field.type.__name__ if type(field.type) is type else str(field.type)
