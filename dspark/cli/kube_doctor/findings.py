"""What a check comes to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from dspark.cli.kube_doctor.objects import Denied


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was got and, unless all is well, what to do."""

    check: str
    level: Level
    got: str
    remedy: str = ""


def ok(check: str, got: str) -> Finding:
    """All is well."""
    return Finding(check, Level.OK, got)


def warning(check: str, got: str, remedy: str) -> Finding:
    """It may do, or could not be looked at."""
    return Finding(check, Level.WARNING, got, remedy)


def failed(check: str, got: str, remedy: str) -> Finding:
    """It will not do."""
    return Finding(check, Level.FAILED, got, remedy)


def unseen(check: str, denied: Denied) -> Finding:
    """What the API did not show: no fault of the cluster, and no proof of its health."""
    return warning(
        check,
        f"not looked at: {denied.reason}",
        f"let an account run this that may get and list {denied.what}",
    )


def listed(names: list[str], most: int = 4) -> str:
    """Some names of many."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
