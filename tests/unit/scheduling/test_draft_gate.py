"""Drafting pauses where it loses and comes back where it pays."""

from __future__ import annotations

from dspark.scheduling.draft_gate import DraftGate


def rounds(gate: DraftGate, committed: int, count: int, requests: int = 8) -> int:
    """Play rounds in which drafting doubles the time; how many were drafted."""
    drafted = 0
    for _ in range(count):
        if gate.open:
            drafted += 1
            gate.record(requests=requests, committed=committed, round_ms=20.0, plain_ms=10.0)
        else:
            gate.tick(requests)
    return drafted


def test_it_stays_open_while_drafting_pays() -> None:
    assert rounds(DraftGate(), committed=24, count=500) == 500


def test_it_drafts_ever_less_while_drafting_loses() -> None:
    gate = DraftGate()
    early, late = rounds(gate, committed=9, count=500), rounds(gate, committed=9, count=2000)
    assert early < 100
    assert late < 40


def test_it_opens_again_when_drafting_comes_to_pay() -> None:
    gate = DraftGate()
    rounds(gate, committed=9, count=500)
    assert rounds(gate, committed=24, count=1500) > 900


def test_another_load_ends_the_pause() -> None:
    gate = DraftGate()
    rounds(gate, committed=9, count=60)
    while gate.open:
        rounds(gate, committed=9, count=1)
    gate.tick(1)
    assert gate.open
