"""Checks that the groups share."""

from __future__ import annotations

import math

from dspark.errors import ConfigError


def positive(settings: object, *names: str) -> None:
    """Each of them is at least 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} must be at least 1; got {getattr(settings, name)}")


def between(settings: object, low: float, high: float, *names: str) -> None:
    """Each of them is a number from `low` to `high`."""
    for name in names:
        value = getattr(settings, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise ConfigError(f"{name} must be a number {limits}; got {value!r}")
