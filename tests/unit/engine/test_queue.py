"""Bounded queues with deadlines: who waits too long is refused, and nothing that has begun is."""

from __future__ import annotations

import pytest
from helpers.tiny import Tally, run, tiny_engine, tiny_target

from dspark.engine import roster
from dspark.engine.verifier import VerifierEngine
from dspark.errors import OverloadedError, QueueTimeoutError
from dspark.types import Request, SamplingParams

TARGET = tiny_target()


def request(name: str, max_tokens: int = 12, epoch: int = 0) -> Request:
    return Request(name, (3, 1, 4), SamplingParams(temperature=0.0, max_tokens=max_tokens), epoch)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(roster.time, "monotonic", clock)
    return clock


def finish(engine: VerifierEngine, tally: Tally) -> None:
    while engine.has_work:
        assert not engine.expire()
        tally.add(engine.step())


def test_who_waits_too_long_is_refused_and_who_has_begun_is_not(clock: Clock) -> None:
    engine, tally = tiny_engine(TARGET, max_requests=1, max_queue_s=30.0), Tally()
    engine.add(request("first"))
    tally.add(engine.step())
    for one in (request("late"), request("moved", epoch=1)):
        engine.add(one)
    clock.now += 20.0
    engine.add(request("young"))
    clock.now += 10.0
    assert not engine.expire()
    clock.now += 0.1
    refused = engine.expire()
    assert set(refused) == {"late"}
    assert isinstance(refused["late"], QueueTimeoutError)
    assert "30 s" in str(refused["late"])
    finish(engine, tally)
    names = ["first", "moved", "young"]
    assert tally.tokens == run(tiny_engine(TARGET), [request(name) for name in names]).tokens
    assert engine.roster.pages.free == engine.roster.pages.total


def test_a_preempted_request_never_expires(clock: Clock) -> None:
    engine, tally = tiny_engine(TARGET, max_queue_s=1.0), Tally()
    for name in "ab":
        engine.add(request(name))
    tally.add(engine.step())
    engine.roster.preempt(engine.roster.running["b"])
    clock.now += 1000.0
    assert not engine.expire()
    assert not engine.dismiss()
    finish(engine, tally)
    assert tally.tokens == run(tiny_engine(TARGET), [request("a"), request("b")]).tokens


def test_without_a_limit_nobody_is_refused(clock: Clock) -> None:
    engine = tiny_engine(TARGET, max_queue_s=0.0)
    engine.add(request("a"))
    clock.now += 1e6
    assert not engine.expire()


def test_the_last_to_have_begun_elsewhere_may_go_over_the_bound() -> None:
    engine = tiny_engine(TARGET, max_waiting=1)
    engine.add(request("a"))
    with pytest.raises(OverloadedError):
        engine.add(request("b"))
    engine.add(request("moved", epoch=2))
    with pytest.raises(OverloadedError):
        engine.add(request("too many", epoch=2))


def test_the_retry_time_follows_queue_and_pace(clock: Clock) -> None:
    engine = tiny_engine(TARGET, max_requests=1, max_waiting=4)
    clock.now += 500.0  # a rest
    for i in range(4):
        engine.add(request(str(i)))
    with pytest.raises(OverloadedError) as caught:
        engine.add(request("x"))
    assert caught.value.retry_after_s == 1.0  # nothing has finished yet
    while engine.has_work:  # one after the other, each in 12 steps
        clock.now += 0.5
        engine.step()
    for i in range(4):
        engine.add(request(str(i)))
    with pytest.raises(OverloadedError) as caught:
        engine.add(request("x"))
    assert caught.value.retry_after_s == pytest.approx(4 * 12 * 0.5, rel=0.1)


def test_dismissing_empties_the_queue_alone() -> None:
    engine, tally = tiny_engine(TARGET, max_requests=1), Tally()
    engine.add(request("runs"))
    tally.add(engine.step())
    for one in (request("waits"), request("moved", epoch=1)):
        engine.add(one)
    assert engine.dismiss() == ["waits", "moved"]
    finish(engine, tally)
    assert tally.tokens == run(tiny_engine(TARGET), [request("runs")]).tokens
    assert engine.roster.pages.free == engine.roster.pages.total
    engine.add(request("waits"))  # its name is free
