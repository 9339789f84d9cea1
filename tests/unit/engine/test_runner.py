"""The engine's thread: the same tokens, refusals told to the caller, one failure told once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from helpers.tiny import Tally, run, tiny_engine, tiny_target

from dspark.engine.runner import EngineRunner
from dspark.engine.verifier import VerifierEngine
from dspark.errors import DSparkError, InvalidRequestError, UnavailableError
from dspark.types import Request, SamplingParams, StepReport, VerificationResult

WAIT_S = 30.0  # until a test gives up; never the time that it takes
TARGET = tiny_target()


def request(name: str, max_tokens: int = 12) -> Request:
    return Request(name, (3, 1, 4), SamplingParams(temperature=0.0, max_tokens=max_tokens))


class Watcher:
    """What a runner calls, kept."""

    def __init__(self, engine: VerifierEngine) -> None:
        self.tally = Tally()
        self.reports: list[StepReport] = []
        self.refusals: dict[str, DSparkError] = {}
        self.failures: list[BaseException] = []
        self.finished: dict[str, threading.Event] = {}
        self.failed = threading.Event()
        self.runner = EngineRunner(
            engine,
            on_results=self._results,
            on_refused=self.refusals.update,
            on_report=self.reports.append,
            on_failure=self._failure,
        )

    def expect(self, name: str) -> threading.Event:
        return self.finished.setdefault(name, threading.Event())

    def _results(self, results: list[VerificationResult]) -> None:
        self.tally.add(results)
        for result in results:
            if result.finish_reason is not None:
                self.expect(result.request_id).set()

    def _failure(self, error: BaseException) -> None:
        self.failures.append(error)
        self.failed.set()


@contextmanager
def running(engine: VerifierEngine) -> Iterator[Watcher]:
    watcher = Watcher(engine)
    watcher.runner.start()
    try:
        yield watcher
    finally:
        watcher.runner.stop()


def test_requests_come_out_as_if_stepped_by_hand() -> None:
    requests = [request("a"), request("b", 5)]
    with running(tiny_engine(TARGET)) as watcher:
        done = [watcher.expect(r.id) for r in requests]
        for one in requests:
            watcher.runner.add(one).result(WAIT_S)
        assert all(event.wait(WAIT_S) for event in done)
    assert watcher.tally.tokens == run(tiny_engine(TARGET), requests).tokens
    assert sum(report.committed for report in watcher.reports) == 17


def test_a_refusal_reaches_its_caller_and_nobody_else() -> None:
    with running(tiny_engine(TARGET)) as watcher:
        done = watcher.expect("good")
        refused = watcher.runner.add(Request("bad", ()))
        watcher.runner.add(request("good")).result(WAIT_S)
        with pytest.raises(InvalidRequestError, match="empty"):
            refused.result(WAIT_S)
        assert done.wait(WAIT_S)
    assert not watcher.failures


def test_a_caller_that_left_before_it_was_heard_costs_nothing() -> None:
    watcher = Watcher(tiny_engine(TARGET))
    watcher.runner.add(request("gone")).cancel()  # what a cancelled call does
    refused = watcher.runner.add(Request("bad", ()))
    refused.cancel()
    done = watcher.expect("here")
    here = watcher.runner.add(request("here"))
    watcher.runner.start()
    here.result(WAIT_S)
    assert done.wait(WAIT_S)
    watcher.runner.stop()
    assert not watcher.failures
    assert set(watcher.tally.tokens) == {"here"}


def test_an_aborted_request_says_no_more() -> None:
    engine = tiny_engine(TARGET)
    watcher = Watcher(engine)
    watcher.runner.add(request("dropped"))
    watcher.runner.abort("dropped")
    done = watcher.expect("kept")
    watcher.runner.add(request("kept"))
    watcher.runner.start()
    assert done.wait(WAIT_S)
    watcher.runner.stop()
    assert set(watcher.tally.tokens) == {"kept"}
    running_, waiting, free, total = watcher.runner.load
    assert (running_, waiting, free) == (0, 0, total)


def test_signals_are_of_now_and_shares_since_the_last_time() -> None:
    engine = tiny_engine(TARGET)
    watcher = Watcher(engine)
    engine.add(request("a"))
    engine.step()
    engine.add(request("b"))
    signals = watcher.runner.signals()
    total = watcher.runner.load[3]
    assert signals.kv_pressure == pytest.approx(1 / total)  # a page of sixteen holds it
    assert signals.queue_age_s > 0.0
    assert (signals.requests, signals.floor_attainment) == (2, 1.0)
    assert signals.drafts_wanted == signals.blocks_missed == 0.0


def test_a_step_that_raises_ends_the_runner_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(TARGET)

    def broken() -> list[VerificationResult]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "step", broken)
    with running(engine) as watcher:
        watcher.runner.add(request("a")).result(WAIT_S)
        assert watcher.failed.wait(WAIT_S)
        with pytest.raises(UnavailableError, match="out of memory"):
            watcher.runner.add(request("b")).result(WAIT_S)
        watcher.runner.abort("a")  # of no use any more, and no error
    assert len(watcher.failures) == 1
    assert str(watcher.runner.failure) == "out of memory"


@pytest.mark.parametrize("max_step_s", [1e-9, 3600.0, 0.0])
def test_an_engine_that_is_stuck_in_a_step_is_noticed(
    monkeypatch: pytest.MonkeyPatch, max_step_s: float
) -> None:
    engine = tiny_engine(TARGET, max_step_s=max_step_s)
    honest, begun, go_on = engine.step, threading.Event(), threading.Event()

    def stuck() -> list[VerificationResult]:
        begun.set()
        assert go_on.wait(WAIT_S)
        return honest()

    monkeypatch.setattr(engine, "step", stuck)
    with running(engine) as watcher:
        watcher.runner.check()  # with nothing to do it may wait for as long as it likes
        done = watcher.expect("a")
        watcher.runner.add(request("a")).result(WAIT_S)
        assert begun.wait(WAIT_S)
        if max_step_s == 1e-9:
            with pytest.raises(UnavailableError, match=r"engine\.max_step_s"):
                watcher.runner.check()
        else:
            watcher.runner.check()
        go_on.set()
        assert done.wait(WAIT_S)
