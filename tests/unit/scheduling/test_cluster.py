"""Where requests go, and who drafts for whom."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.errors import ModelNotFoundError, UnavailableError
from dspark.scheduling.cluster import Cluster, Load, Replica, Role
from dspark.scheduling.placement import Ask

LEASE_S = 5.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def cluster() -> tuple[Cluster, Clock]:
    clock = Clock()
    return Cluster(LEASE_S, clock), clock


def verifier(name: str, model: str = "m", weights: str = "w") -> Replica:
    return Replica(Role.VERIFIER, name, f"{name}:1", model, weights)


def draft(name: str, weights: str = "w") -> Replica:
    return Replica(Role.DRAFT, name, f"{name}:1", "m", weights)


@given(
    st.lists(
        st.tuples(st.sampled_from(["m", "other"]), st.booleans(), st.floats(0.0, 10.0)),
        min_size=1,
        max_size=8,
    )
)
def test_requests_go_to_live_verifiers_of_their_model(
    members: list[tuple[str, bool, float]],
) -> None:
    known, clock = cluster()
    for i, (model, draining, seen_at) in sorted(enumerate(members), key=lambda x: x[1][2]):
        clock.now = seen_at
        known.beat(verifier(str(i), model), Load(), draining)
    clock.now = 10.0
    fit = {
        str(i)
        for i, (model, draining, seen_at) in enumerate(members)
        if model == "m" and not draining and 10.0 - seen_at <= LEASE_S
    }
    if fit:
        assert known.place("r", "m").incarnation in fit
    else:
        with pytest.raises((UnavailableError, ModelNotFoundError)):
            known.place("r", "m")


@given(st.integers(1, 5), st.integers(1, 40))
def test_a_burst_between_heartbeats_spreads(replicas: int, requests: int) -> None:
    known, _ = cluster()
    for i in range(replicas):
        known.beat(verifier(str(i)), Load())
    placed = Counter(known.place(f"r{i}", "m").incarnation for i in range(requests))
    assert max(placed.values()) - min(placed.get(str(i), 0) for i in range(replicas)) <= 1


def test_the_less_busy_verifier_is_chosen_and_pages_break_ties() -> None:
    known, _ = cluster()
    known.beat(verifier("busy"), Load(running=3, waiting=1, free_pages=100))
    known.beat(verifier("idle"), Load(running=1, free_pages=5))
    known.beat(verifier("roomy"), Load(running=1, free_pages=50))
    assert known.place("r", "m").incarnation == "roomy"


def test_a_repeated_request_goes_where_it_went() -> None:
    known, _ = cluster()
    for name in "abc":
        known.beat(verifier(name), Load())
    first = known.place("r", "m").incarnation
    known.place("other", "m")
    assert known.place("r", "m").incarnation == first


def test_shunned_verifiers_are_the_last_resort() -> None:
    known, _ = cluster()
    known.beat(verifier("a"), Load())
    known.beat(verifier("b"), Load(running=9))
    assert known.place("r", "m", avoid=["a"]).incarnation == "b"
    assert known.place("r2", "m", avoid=["a", "b"]).incarnation == "a"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 9), st.data())
def test_no_request_goes_where_it_does_not_fit(
    contexts: list[int], tokens: int, data: st.DataObject
) -> None:
    known, _ = cluster()
    for i, context in enumerate(contexts):
        known.beat(replace(verifier(str(i)), max_context_tokens=context), Load())
    fit = {str(i) for i, context in enumerate(contexts) if not context or tokens <= context}
    avoid = data.draw(st.sets(st.sampled_from([str(i) for i in range(len(contexts))])))
    ask = Ask(prompt_tokens=tokens // 2, max_tokens=tokens - tokens // 2)
    if fit:
        assert known.place("r", "m", avoid, ask).incarnation in (fit - avoid or fit)
    else:
        with pytest.raises(UnavailableError, match=f"{tokens} positions"):
            known.place("r", "m", avoid, ask)


def test_a_model_that_left_is_unavailable_and_one_that_never_was_is_not_found() -> None:
    known, clock = cluster()
    known.beat(verifier("a"), Load())
    clock.now = LEASE_S + 1
    with pytest.raises(UnavailableError, match="at the moment"):
        known.place("r", "m")
    with pytest.raises(ModelNotFoundError, match="hosted here: m"):
        known.place("r", "never")


def test_gateways_that_listen_at_every_interface_are_not_taken_for_one() -> None:
    known, _ = cluster()
    for _ in range(2):
        for name in ("a", "b"):
            known.beat(Replica(Role.GATEWAY, name, "0.0.0.0:50051"), Load())
    assert {member.replica.incarnation for member in known.members()} == {"a", "b"}


def test_a_new_process_at_an_address_replaces_the_old() -> None:
    known, _ = cluster()
    known.beat(Replica(Role.VERIFIER, "old", "host:1", "m"), Load())
    known.beat(Replica(Role.VERIFIER, "new", "host:1", "m"), Load())
    assert [m.replica.incarnation for m in known.members()] == ["new"]


def drafts(known: Cluster, verifier: str) -> dict[str, float]:
    """Share by incarnation."""
    shares = known.drafts_for(verifier)
    return {one.member.replica.incarnation: one.share for one in shares}


def test_pairs_are_balanced_and_stay() -> None:
    known, _ = cluster()
    for i in range(4):
        known.beat(verifier(f"v{i}"), Load())
    for name in ("d0", "d1"):
        known.beat(draft(name), Load())
    first = {f"v{i}": drafts(known, f"v{i}") for i in range(4)}
    assert sorted(Counter(d for shares in first.values() for d in shares).values()) == [2, 2]
    assert all(list(shares.values()) == [0.5] for shares in first.values())
    assert {v: drafts(known, v) for v in first} == first
    known.beat(draft("d2"), Load())  # takes one of them, and the others stay
    second = {v: drafts(known, v) for v in first}
    assert [d for v, d in second.items() if d.keys() != first[v].keys()] == [{"d2": 1.0}]
    assert {v: drafts(known, v) for v in first} == second


def test_verifiers_have_several_draft_replicas_where_there_are_more_of_them() -> None:
    known, clock = cluster()
    for name in ("v0", "v1"):
        known.beat(verifier(name), Load())
    for i in range(5):
        known.beat(draft(f"d{i}"), Load())
    first = {name: drafts(known, name) for name in ("v0", "v1")}
    assert sorted(len(shares) for shares in first.values()) == [2, 3]
    assert set(first["v0"]) | set(first["v1"]) == {f"d{i}" for i in range(5)}
    assert {share for shares in first.values() for share in shares.values()} == {1.0}
    clock.now = LEASE_S + 1
    known.beat(verifier("v0"), Load())
    known.beat(draft("d0"), Load())
    assert drafts(known, "v0") == {"d0": 1.0}


def test_a_verifier_moves_when_its_draft_dies_or_drains() -> None:
    known, clock = cluster()
    known.beat(verifier("v"), Load())
    known.beat(draft("a"), Load())
    assert drafts(known, "v") == {"a": 1.0}
    known.beat(draft("a"), Load(), draining=True)
    assert not drafts(known, "v")
    known.beat(draft("b"), Load())
    assert drafts(known, "v") == {"b": 1.0}
    clock.now = LEASE_S + 1
    known.beat(verifier("v"), Load())
    assert not drafts(known, "v")


def test_only_the_same_weights_are_paired() -> None:
    known, _ = cluster()
    known.beat(verifier("v", weights="w"), Load())
    known.beat(verifier("plain", weights=""), Load())
    known.beat(draft("d", weights="other"), Load())
    for name in ("v", "plain", "nobody"):
        assert not known.drafts_for(name)


def test_a_draft_replica_stays_saturated_until_it_is_much_less_busy() -> None:
    known, _ = cluster()
    known.beat(verifier("v"), Load())

    def saturated(busy: float, queued: int) -> bool:
        known.beat(draft("d"), Load(busy_share=busy, queued_works=queued))
        (one,) = known.drafts_for("v")
        return one.member.saturated

    assert [saturated(0.95, 0), saturated(0.95, 4), saturated(0.8, 0)] == [False, True, True]
    assert [saturated(0.5, 4), saturated(0.8, 4)] == [False, False]
