"""The mechanism under :mod:`lmx.config`: fields that carry their meaning and what they may hold."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict as mlcd

from lmx.errors import ConfigError, nearest, suggestion


def option(default: Any, meaning: str, *, choices: tuple = (), low: float | None = None, high: float | None = None):
    """A field with its meaning (shown by ``lmx train --help-config``) and what it may hold.

    Args:
      default: the value where none is given.
      meaning: one sentence, with the unit.
      choices: the only values allowed, if not empty.
      low, high: inclusive bounds of a number.
    """
    return dataclasses.field(
        default=default, metadata={"meaning": meaning, "choices": choices, "low": low, "high": high}
    )


def section(cls: type, meaning: str):
    """A nested section, defaulting to that section's own defaults."""
    return dataclasses.field(default_factory=cls, metadata={"meaning": meaning})


def leaves(cls: type, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every leaf field of the schema by its dotted name."""
    found = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            found |= leaves(field.type, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = field
    return found


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The leaves in which two nested dicts differ, by dotted name; a leaf one lacks counts as None."""
    found = {}
    for name in sorted({*a, *b}):
        left, right = a.get(name), b.get(name)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found |= differences(left, right, f"{prefix}{name}.")
        elif left != right:
            found[prefix + name] = (left, right)
    return found


def merge(base: dict, changes: Mapping[str, Any]) -> dict:
    """``base`` with the leaves of ``changes`` put over it."""
    merged = dict(base)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(value, Mapping) and isinstance(old, dict) else value
    return merged


def placeholders(node: Any) -> dict[str, Any]:
    """The section as nested dicts in which none is a typed hole, so that a flag may fill it."""
    values = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            value = placeholders(value)
        elif value is None:
            value = mlcd.placeholder(next(t for t in typing.get_args(field.type) if t is not types.NoneType))
        values[field.name] = value
    return values


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """Makes ``cls`` and the sections in it from nested dicts; raises :class:`ConfigError` for an unknown name."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"a config is an object with sections, not {values!r:.99}")
    known = [*leaves(cls), *(field.name for field in dataclasses.fields(cls))]

    def make(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
        fields = {field.name: field for field in dataclasses.fields(cls)}
        arguments = {}
        for name, value in values.items():
            if name not in fields:
                raise ConfigError(f"config has no field {prefix + name!r}{nearest(prefix + name, known)}")
            if dataclasses.is_dataclass(fields[name].type):
                if not isinstance(value, Mapping):
                    raise ConfigError(f"{prefix}{name} is a section with fields of its own, not {value!r}")
                value = make(fields[name].type, value, f"{prefix}{name}.")
            arguments[name] = value
        return cls(**arguments)

    return make(cls, values, "")


def check_section(node: Any, prefix: str = "") -> None:
    """Checks every field of a frozen dataclass, and of the sections in it, by its type and metadata."""
    for field in dataclasses.fields(node):
        name, value = prefix + field.name, getattr(node, field.name)
        if dataclasses.is_dataclass(field.type):
            if not isinstance(value, field.type):
                raise ConfigError(f"{name} must be a {field.type.__name__} section, not {value!r}")
            check_section(value, f"{name}.")
        else:
            object.__setattr__(node, field.name, _checked(name, field, value))


def _checked(name: str, field: dataclasses.Field, value: Any) -> Any:
    """The value, with int made float and list made tuple where that is meant; an error where it does not fit."""
    kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    if value is None and types.NoneType in kinds:
        return None
    kind, meaning = kinds[0], field.metadata["meaning"]
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        found, value = value, None
        if isinstance(found, tuple | list):
            value = tuple(_widened(element, item) for item in found)
        if value is None or any(type(item) is not element for item in value):
            raise ConfigError(f"{name} must be a tuple of {element.__name__}, not {found!r}. {meaning}")
    else:
        value = _widened(kind, value)
        if type(value) is not kind:
            raise ConfigError(f"{name} must be {kind.__name__}, not {value!r} ({type(value).__name__}). {meaning}")
    low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
    for item in value if isinstance(value, tuple) else (value,):
        if choices and item not in choices:
            meant = suggestion(str(item), choices)
            raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {item!r}{meant or '.'}")
        if (low is not None and not item >= low) or (high is not None and not item <= high):  # nan is neither
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ConfigError(f"{name} must be {bounds}, not {item!r}. {meaning}")
    return value


def _widened(kind: type, value: Any) -> Any:
    return float(value) if kind is float and type(value) is int else value
