"""Which draft replicas serve which verifiers. Pure.

There are as many pairs as there are replicas on the larger side. With no more drafts than
verifiers, every verifier has one draft replica and shares it with others; with more, every draft
replica has one verifier, and verifiers have several. Either way the loads of the smaller side
differ by one at most. Pairs of before stay as far as that allows: a session's context lives in its
draft replica, and has to be sent again after a move.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

Pair = tuple[str, str]  # verifier, draft


def pair(
    verifiers: Collection[str], drafts: Collection[str], before: Iterable[Pair] = ()
) -> frozenset[Pair]:
    """Pairs for these replicas, given those of before; none if one side is empty."""
    if not verifiers or not drafts:
        return frozenset()
    if len(drafts) <= len(verifiers):
        return frozenset(_spread(verifiers, drafts, before))
    turned = _spread(drafts, verifiers, ((d, v) for v, d in before))
    return frozenset((v, d) for d, v in turned)


def _spread(
    many: Collection[str], few: Collection[str], before: Iterable[tuple[str, str]]
) -> list[tuple[str, str]]:
    """One of `few` for each of `many`, evenly."""
    last: dict[str, str] = {}
    for one, partner in sorted(before):
        if one in many and partner in few:
            last.setdefault(one, partner)
    groups: dict[str, list[str]] = {partner: [] for partner in sorted(few)}
    for one, partner in last.items():
        groups[partner].append(one)
    homeless = sorted(set(many) - last.keys())
    least, larger = divmod(len(many), len(few))
    # Whoever has most keeps one more than the others, so that fewest move.
    for i, group in enumerate(sorted(groups.values(), key=len, reverse=True)):
        room = least + (i < larger)
        homeless += group[room:]
        del group[room:]
        group += [""] * (room - len(group))
    waiting = iter(homeless)
    return [(one or next(waiting), partner) for partner, group in groups.items() for one in group]
