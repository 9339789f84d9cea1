"""Where a request's text has said the same before."""

from __future__ import annotations

from dataclasses import dataclass, field

_MATCHES = (4, 3, 2)  # tokens that must have occurred before; the longest match counts


@dataclass(frozen=True, slots=True)
class Drafted:
    """What was drafted from a position on."""

    start: int
    match: int  # tokens that had matched
    token_ids: list[int]


@dataclass(slots=True, eq=False)
class TextIndex:
    """Where each short run of tokens was last followed by another: three entries a token at most.

    Belongs to one request, and goes with it.
    """

    after: dict[tuple[int, ...], int] = field(default_factory=dict)
    end: int = 0  # tokens before it are indexed
    drafted: Drafted | None = None  # of which it is yet to be seen what comes true

    def find(self, tokens: list[int]) -> tuple[int, int]:
        """Length of the match and the position after it, the latest; zeros if there is none."""
        for following in range(self.end, len(tokens)):
            for length in _MATCHES:
                if following >= length:
                    self.after[tuple(tokens[following - length : following])] = following
        self.end = len(tokens)
        for length in _MATCHES:
            if length < len(tokens):
                position = self.after.get(tuple(tokens[-length:]))
                if position is not None:
                    return length, position
        return 0, 0
