"""Which verifier was last given a prompt that begins like this one. No I/O."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import NamedTuple

MOST_PREFIXES = 16  # of one prompt
_MOST_KEPT = 1 << 16


class Prefix(NamedTuple):
    """The first tokens of a prompt."""

    tokens: int
    hash: int  # 64 bits, of the model and all of the tokens


class PrefixMemory:
    """Prefixes by their hash, those used last; two that collide cost a better choice, no more."""

    def __init__(self, most_kept: int = _MOST_KEPT) -> None:
        self._most_kept = most_kept
        self._given_to: OrderedDict[int, str] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._given_to)

    def cached_tokens(self, prefixes: Sequence[Prefix], alive: Collection[str]) -> dict[str, int]:
        """By incarnation, the longest of the prefixes that it was the last to get.

        Incarnations that are gone are forgotten.
        """
        cached: dict[str, int] = {}
        for prefix in prefixes:
            name = self._given_to.get(prefix.hash)
            if name is None:
                continue
            if name not in alive:
                del self._given_to[prefix.hash]
                continue
            cached[name] = max(prefix.tokens, cached.get(name, 0))
        return cached

    def give(self, prefixes: Sequence[Prefix], name: str) -> None:
        """A prompt with these prefixes goes to `name`."""
        for prefix in prefixes:
            self._given_to[prefix.hash] = name
            self._given_to.move_to_end(prefix.hash)
        while len(self._given_to) > self._most_kept:
            self._given_to.popitem(last=False)
