"""Resident memory of the processes that a measurement started; needs the extra `bench`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Process:
    """One process at one moment. Pages that processes share count in each."""

    title: str
    resident_bytes: int


def children() -> list[Process]:
    """Every living descendant of this process."""
    import psutil

    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            title, resident = " ".join(child.cmdline()), child.memory_info().rss
        except psutil.Error:
            continue  # it ended while we looked
        found.append(Process(title, resident))
    return found


def by_group(processes: list[Process], group: Callable[[str], str]) -> Mapping[str, int]:
    """Bytes summed over processes whose titles `group` names alike."""
    sums: dict[str, int] = {}
    for process in processes:
        name = group(process.title)
        sums[name] = sums.get(name, 0) + process.resident_bytes
    return sums
