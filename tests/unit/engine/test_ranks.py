"""A target over two processes: the same tokens, and no process outlives or waits for another."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import select
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from helpers.steps import STEPS, Cache
from helpers.tiny import TAPS, hf_model, run, tiny_drafter, tiny_engine

from dspark.engine.runner import EngineRunner
from dspark.errors import UnavailableError
from dspark.models.kv_cache import PagedKVCache
from dspark.models.ranks import RankProcess, RankTask, _Loss
from dspark.models.target import TargetBatch, TargetModel, TargetOutput
from dspark.types import Request, SamplingParams

WAIT_S = 60.0  # until a test gives up; never the time that it takes
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}  # fp32: sums in other orders, of logits of about 4
REQUESTS = [
    Request(name, prompt, SamplingParams(temperature=0.0, max_tokens=24))
    for name, prompt in (("a", (3, 1, 4)), ("b", tuple(range(40))), ("c", (9,)))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    hf_model("qwen3", vocab=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> TargetModel:
    return TargetModel.load(folder, dtype=torch.float32, tap_layer_ids=TAPS)


@pytest.fixture(scope="module")
def split(folder: Path) -> Iterator[TargetModel]:
    """In two, of which the second process starts once for all tests here; the last one ends it."""
    target = TargetModel.load(folder, dtype=torch.float32, tap_layer_ids=TAPS, tensor_parallel=2)
    yield target
    target.close()


def test_a_split_target_says_what_the_whole_one_says(
    split: TargetModel, whole: TargetModel
) -> None:
    assert (split.tensor_parallel, whole.tensor_parallel) == (2, 1)
    for seed in (0, 1):  # another cache each, of which the first is dropped
        ours, theirs = Cache(seed), Cache(seed)
        for rows in STEPS:
            want, got = theirs.step(whole, rows), ours.step(split, rows)
            torch.testing.assert_close(got.logits, want.logits, **TOLERANCE)
            torch.testing.assert_close(got.taps, want.taps, **TOLERANCE)
        keys = [cache.kv.layer(0).keys for cache in (ours, theirs)]  # type: ignore[attr-defined]
        assert (keys[0].shape[1], keys[1].shape[1]) == (1, 2)  # KV heads
    texts, rows = [torch.arange(20), torch.arange(7) + 3], torch.tensor([3, 19, 26])
    got, want = split.forward_whole(texts, rows), whole.forward_whole(texts, rows)
    torch.testing.assert_close(got.logits, want.logits, **TOLERANCE)


def test_drafting_over_a_split_target_changes_nothing(
    split: TargetModel, whole: TargetModel
) -> None:
    drafter = tiny_drafter(whole)
    plain = run(tiny_engine(whole), REQUESTS)
    assert run(tiny_engine(split), REQUESTS).tokens == plain.tokens
    drafted = run(tiny_engine(split, drafter, check_pages=True), REQUESTS)
    assert drafted.tokens == plain.tokens
    assert drafted.drafted > 0
    assert drafted.accepted > 0


def test_what_a_step_says_does_not_count_once_a_rank_is_lost(
    split: TargetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, engine, forward = _Loss(), tiny_engine(split), split.forward
    assert split._ranks is not None
    monkeypatch.setattr(split._ranks, "_loss", loss)  # that of the tests below is another

    def lose(batch: TargetBatch, kv: PagedKVCache) -> TargetOutput:
        out = forward(batch, kv)  # as on a GPU, where it returns before its sums are done
        loss.tell(UnavailableError("rank 1 is lost"))
        return out

    engine.add(REQUESTS[0])
    monkeypatch.setattr(split, "forward", lose)
    with pytest.raises(UnavailableError, match="rank 1 is lost"):
        engine.step()


def test_a_rank_ends_with_rank_0_even_if_that_is_killed(folder: Path) -> None:
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    rank_0 = multiprocessing.get_context("fork").Process(target=_start_rank, args=(folder, theirs))
    rank_0.start()
    handle = os.pidfd_open(ours.recv())
    rank_0.kill()
    readable, _, _ = select.select([handle], [], [], WAIT_S)
    os.close(handle)
    rank_0.join()
    assert readable, "the rank lives on"


def _start_rank(folder: Path, tell: Connection) -> None:
    task = RankTask(
        str(folder), 1, 2, dtype="float32", device="cpu", threads=1,
        store=str(folder / "store"), log_level=logging.WARNING,
    )  # fmt: skip
    tell.send(RankProcess(task).pid)
    threading.Event().wait()


def test_rank_0_takes_leave_before_the_others_end(folder: Path) -> None:
    """NCCL would wait for them at the end of its group: it has to be told that nobody comes."""
    target = TargetModel.load(folder, dtype=torch.float32, tensor_parallel=2)
    assert target._ranks is not None
    (pid,) = target._ranks.pids
    (shard,) = target._ranks._shards
    there: list[bool] = []

    def let_go() -> None:
        os.kill(pid, 0)  # ProcessLookupError if it has ended and was waited for
        there.append(True)

    target._ranks._shards[:] = [dataclasses.replace(shard, let_go=let_go)]
    target.close()
    assert there == [True]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    target.close()
    assert there == [True]


def test_a_rank_that_dies_fails_the_engine_at_once(split: TargetModel) -> None:
    failures: list[BaseException] = []
    failed = threading.Event()

    def fail(error: BaseException) -> None:
        failures.append(error)
        failed.set()

    runner = EngineRunner(
        tiny_engine(split),
        on_results=lambda results: None,
        on_refused=lambda refusals: None,
        on_report=lambda report: None,
        on_failure=fail,
    )
    runner.start()
    runner.add(REQUESTS[0]).result(WAIT_S)
    assert split._ranks is not None
    os.kill(split._ranks.pids[0], 9)
    assert failed.wait(10.0)  # a sum would be waited for six times as long
    assert runner.failure is failures[0]
    assert "rank 1 of 2 of the target" in str(failures[0])
    with pytest.raises(UnavailableError, match="status -9"):
        runner.add(REQUESTS[1]).result(WAIT_S)
    runner.stop()
    with pytest.raises(UnavailableError, match="status -9"):
        split.forward_whole([torch.arange(3)], torch.tensor([2]))
    assert len(failures) == 1
