"""The draft worker's turns: fair among clients, in order within each."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from helpers.draft_services import TARGET, worker

from dspark.errors import UnavailableError
from dspark.services.draft.worker import Answer, DraftWorker
from dspark.types import BlockProposal, DraftWork, Fence, ResyncRequest, SamplingParams

WIDTH = TARGET.config.hidden_size
GREEDY = SamplingParams(temperature=0.0)


def work(session: str, start: int = 0, rows: int = 1) -> DraftWork:
    """Context that follows what is there, and a block."""
    fence = Fence(session, 0, 0, start + rows + 1)
    return DraftWork(fence, start, torch.zeros(rows, WIDTH), 1, 4, GREEDY)


class Log:
    """What was answered, in order."""

    def __init__(self, most: int) -> None:
        self.answers: list[tuple[str, int, int]] = []  # name, blocks, resyncs
        self.complete = threading.Event()
        self._most = most

    def note(self, name: str) -> Answer:
        def answer(proposals: list[BlockProposal], resyncs: list[ResyncRequest]) -> None:
            self.answers.append((name, len(proposals), len(resyncs)))
            if len(self.answers) == self._most:
                self.complete.set()

        return answer


def wait(made: DraftWorker, log: Log) -> None:
    made.start()
    assert log.complete.wait(30)


def test_many_requests_of_one_verifier_do_not_starve_another() -> None:
    with worker(max_batch_works=8, start=False) as (made, _):
        log = Log(8)
        for turn in range(4):
            large = [work(f"{turn}.{i}") for i in range(8)]
            made.submit(0, large, log.note("large"))
        for turn in range(4):
            made.submit(1, [work(f"{turn}")], log.note("small"))
        wait(made, log)
        made.free(0, None)
        made.free(1, None)
    # Four works of the small client do not make up for one job of the large one.
    assert [name for name, _, _ in log.answers] == ["large", *["small"] * 4, *["large"] * 3]
    assert sum(blocks for name, blocks, _ in log.answers if name == "large") == 32
    assert sum(blocks for name, blocks, _ in log.answers if name == "small") == 4


def test_a_free_keeps_its_place_among_the_work_of_its_client() -> None:
    with worker(start=False) as (made, engine):
        log = Log(4)
        made.submit(0, [work("a")], log.note("before"))
        made.free(0, ["a"])
        made.submit(0, [work("a", start=1)], log.note("after"))
        made.submit(1, [work("a")], log.note("other's"))
        made.free(1, ["b"])
        made.submit(1, [work("a", start=1)], log.note("other's"))
        wait(made, log)
        assert engine.sessions == 1
        made.free(1, None)
        made.free(0, None)
    by_name = [(name, resyncs) for name, _, resyncs in log.answers]
    assert ("before", 0) in by_name
    assert ("after", 1) in by_name, "a freed session was still there"
    assert by_name.count(("other's", 0)) == 2


def test_speed_and_backlog_are_told() -> None:
    with worker(max_batch_works=4, start=False) as (made, _):
        assert made.works_per_s == 0.0
        log = Log(3)
        for turn in range(3):
            made.submit(0, [work(f"{turn}.{i}") for i in range(4)], log.note("job"))
        wait(made, log)
        assert made.works_per_s > 0.0
        assert made.most_waiting() == 8
        assert made.most_waiting() == 0
        made.free(0, None)


@pytest.mark.parametrize("max_run_s", [1e-9, 3600.0, 0.0])
def test_a_worker_that_is_stuck_in_a_run_is_noticed(
    monkeypatch: pytest.MonkeyPatch, max_run_s: float
) -> None:
    with worker(start=False) as (made, engine):
        honest, begun, go_on = engine.run, threading.Event(), threading.Event()

        def stuck(works: Sequence[DraftWork]) -> tuple[list[BlockProposal], list[ResyncRequest]]:
            begun.set()
            assert go_on.wait(30)
            return honest(works)

        monkeypatch.setattr(engine, "run", stuck)
        made.start()
        made.check(max_run_s)  # with nothing to do it may wait for as long as it likes
        log = Log(1)
        made.submit(0, [work("a")], log.note("job"))
        assert begun.wait(30)
        if max_run_s == 1e-9:
            with pytest.raises(UnavailableError, match=r"draft\.max_run_s"):
                made.check(max_run_s)
        else:
            made.check(max_run_s)
        go_on.set()
        assert log.complete.wait(30)
        made.free(0, None)
