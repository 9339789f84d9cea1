"""From a file or plain data to settings; unknown keys are errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dspark.errors import ConfigError

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """A settings object from plain data, nested; ConfigError names a key that does not exist."""
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(map(repr, values.keys() - known.keys()))
    if unknown:
        raise ConfigError(
            f"{cls.__name__} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    made: dict[str, Any] = {}
    for key, value in values.items():
        nested: Any = known[key].default_factory
        is_group = isinstance(nested, type)
        if is_group and not isinstance(value, Mapping | nested):
            raise ConfigError(f"{key} must be a mapping of settings; got {value!r}")
        if (each := known[key].metadata.get("values")) is not None:
            made[key] = {name: _named(each, key, name, group) for name, group in value.items()}
        else:
            made[key] = build(nested, value) if isinstance(value, Mapping) else value
            if (kind := _KINDS.get(str(known[key].type))) is not None:
                made[key] = _of_kind(key, value, *kind)
    return cls(**made)


# By annotation: what a plain setting must be.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "text (YAML reads a bare 7 or off as something else: put it in quotes)"),
}


def _of_kind(key: str, value: Any, kinds: tuple[type, ...], called: str) -> Any:
    """`value`, if it is of one of `kinds`, else ConfigError; on the way here 32 may become 32.0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kinds == (int,) and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, kinds) or (int in kinds and not is_number):
        raise ConfigError(f"{key} must be {called}; got {value!r}")
    return value


def _named(cls: type[T], key: str, name: str, group: object) -> T:
    """One of the settings groups that `key` holds by name."""
    if isinstance(group, cls):
        return group
    if not isinstance(group, Mapping):
        raise ConfigError(f"{key}.{name} must be a mapping of settings; got {group!r}")
    return build(cls, group)


def read_settings(path: Path) -> dict[str, Any]:
    """Settings of a YAML or JSON file; ConfigError if it cannot be read as a mapping."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read settings from {path}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold a mapping of settings; got {type(raw).__name__}")
    return raw
