"""Which draft replicas serve which verifiers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from dspark.scheduling.pairing import Pair, pair

counts = st.integers(1, 12)
histories = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 99)), max_size=12)


def names(kind: str, count: int) -> list[str]:
    return [f"{kind}{i}" for i in range(count)]


def check(pairs: Collection[Pair], verifiers: Collection[str], drafts: Collection[str]) -> None:
    """What has to hold of any pairs."""
    by_verifier, by_draft = Counter(v for v, _ in pairs), Counter(d for _, d in pairs)
    assert by_verifier.keys() == set(verifiers)
    assert by_draft.keys() == set(drafts)
    for loads in (by_verifier, by_draft):
        assert max(loads.values()) - min(loads.values()) <= 1
    assert len(pairs) == max(len(verifiers), len(drafts))


@given(counts, counts, st.randoms(use_true_random=False))
def test_every_replica_is_paired_evenly_whatever_the_order(
    verifiers: int, drafts: int, rng: random.Random
) -> None:
    one, other = names("v", verifiers), names("d", drafts)
    pairs = pair(one, other)
    check(pairs, one, other)
    rng.shuffle(one)
    rng.shuffle(other)
    assert pair(one, other) == pairs
    assert pair(one, other, pairs) == pairs, "pairs moved though nothing had changed"


def most_kept(verifiers: list[str], drafts: list[str], before: Iterable[Pair]) -> int:
    """Of the pairs of before, how many the best of all even pairings keeps."""
    turned = len(drafts) > len(verifiers)
    many, few = (drafts, verifiers) if turned else (verifiers, drafts)
    known = {(d, v) for v, d in before} if turned else set(before)
    best = 0
    for partners in product(few, repeat=len(many)):
        loads = Counter(dict.fromkeys(few, 0))
        loads.update(partners)
        if max(loads.values()) - min(loads.values()) <= 1:
            best = max(best, len(known & set(zip(many, partners, strict=True))))
    return best


@given(st.integers(1, 4), st.integers(1, 4), histories)
def test_a_change_of_one_replica_moves_as_few_pairs_as_need_be(
    verifiers: int, drafts: int, history: list[tuple[bool, bool, int]]
) -> None:
    sides = {"v": names("v", verifiers), "d": names("d", drafts)}
    pairs = pair(sides["v"], sides["d"])
    for born, (of_drafts, joins, which) in enumerate(history):
        side = sides["d" if of_drafts else "v"]
        if joins and len(side) < 5:
            side.append(f"new{born}")
        elif len(side) > 1:
            side.pop(which % len(side))
        after = pair(sides["v"], sides["d"], pairs)
        check(after, sides["v"], sides["d"])
        assert len(after & pairs) == most_kept(sides["v"], sides["d"], pairs)
        pairs = after


@given(counts, counts, st.booleans())
def test_one_more_draft_takes_its_part_and_no_more(verifiers: int, drafts: int, last: bool) -> None:
    one, other = names("v", verifiers), names("d", drafts)
    pairs = pair(one, other)
    joined = pair(one, [*other, "z" if last else "a"], pairs)
    assert len(pairs - joined) == (verifiers // (drafts + 1) if drafts < verifiers else 0)


def test_without_a_partner_there_are_no_pairs() -> None:
    assert pair([], ["d"]) == pair(["v"], []) == pair([], []) == frozenset()


def test_pairs_of_replicas_that_are_gone_are_forgotten() -> None:
    gone = [("v0", "gone"), ("gone", "d0"), ("v1", "d0")]
    assert pair(["v0", "v1"], ["d0", "d1"], gone) == {("v0", "d1"), ("v1", "d0")}
