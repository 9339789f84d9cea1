"""When a draft replica is saturated, and how many blocks a round each of its verifiers then gets.

Verifiers take turns at a draft replica: while one steps, it drafts for the others. A verifier that
need not wait for its turn is one whose step lasts as long as the others' blocks take; so each gets
as many as make that true of all, if they are alike. A verifier alone with a replica gets what can
be drafted for one half of its requests while the other half is stepped.
"""

from __future__ import annotations

from collections.abc import Iterable

_SATURATED_FROM = 0.9  # busy share, with works waiting
_SATURATED_UNTIL = 0.7
_MOST = 65536.0  # that a bound can be


def is_saturated(busy_share: float, queued_works: int, was: bool) -> bool:
    """Whether a draft replica is asked for more than it can do, given whether it was."""
    if was:
        return busy_share >= _SATURATED_UNTIL
    return busy_share >= _SATURATED_FROM and queued_works > 0


def max_blocks(
    parts: Iterable[tuple[float, float]],  # of each draft replica: share in 0..1, works a second
    step_s: float,
) -> int:
    """Most requests to draft for in one round of a verifier whose steps take so long; 0: no bound.

    There is no bound while a figure is not known.
    """
    works = 0.0
    for share, works_per_s in parts:
        if works_per_s <= 0.0:
            return 0
        others = max(1.0, 1.0 / share - 1.0)
        works += works_per_s * step_s / others
    return max(1, int(works)) if 0.0 < works < _MOST else 0
