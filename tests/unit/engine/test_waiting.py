"""The host waits for a device once a step, for the verdicts, and once for the blocks.

A device of no values stands in for a GPU: whatever else reads one of its values fails.
"""

from __future__ import annotations

import pytest
import torch
from helpers.far_device import FAR, WaitedError, Watch
from helpers.tiny import TAPS, hf_model, tiny_drafter, tiny_engine, tiny_target

from dspark.engine import judge
from dspark.engine.verifier import VerifierEngine
from dspark.models.target import TargetModel
from dspark.types import Request, SamplingParams, VerifyMode

KINDS = (
    SamplingParams(temperature=0.0, max_tokens=30),
    SamplingParams(max_tokens=30),
    SamplingParams(top_k=3, max_tokens=30),
    SamplingParams(top_p=0.8, top_k=500, max_tokens=30),
    SamplingParams(top_p=0.8, max_tokens=30, mode=VerifyMode.COUPLED),
    SamplingParams(max_tokens=30, speculate=False),
)


def far_engine(padded: bool, drafts: bool, window: int = 0) -> VerifierEngine:
    target = TargetModel(hf_model("qwen3").to(FAR), TAPS, padded=padded)
    drafter = tiny_drafter(tiny_target("qwen3"), window=window).to(FAR) if drafts else None
    engine = tiny_engine(target, drafter, policy="fixed", prefill_chunk_tokens=24)
    engine.warm_up()
    return engine


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("drafts", "window"), [(False, 0), (True, 0), (True, 5)])
@pytest.mark.parametrize("kinds", [KINDS, KINDS[:1]])
def test_a_step_waits_for_its_verdicts_and_its_blocks(
    padded: bool, drafts: bool, window: int, kinds: tuple[SamplingParams, ...]
) -> None:
    engine = far_engine(padded, drafts, window)
    for i, kind in enumerate(kinds):  # some end early, and then want shorter blocks
        engine.add(Request(str(i), (1, 2, 3) * (1 + 5 * i), kind))
    waits, verified = [], 0
    for _ in range(6):
        with Watch() as watch:
            results = engine.step()
        verified += sum(result.verified for result in results)
        waits.append(watch.fetched)
    assert max(waits) == 1 + drafts
    assert (verified > 0) is drafts


def test_one_copy_takes_a_padded_step_there() -> None:
    engine = far_engine(padded=True, drafts=False)
    engine.add(Request("a", (1, 2, 3), KINDS[0]))
    for _ in range(3):
        with Watch() as watch:
            engine.step()
        assert (watch.sent, watch.fetched) == (2, 1)  # the step, what judges it; the verdict


def test_a_value_that_is_read_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = judge.target_law
    monkeypatch.setattr(judge, "target_law", lambda *given: honest(*given[:-1]))
    engine = far_engine(padded=True, drafts=False)
    engine.add(Request("a", (1, 2, 3), KINDS[1]))
    with pytest.raises((WaitedError, RuntimeError)), Watch():
        engine.step()


def test_what_a_judge_is_told_is_on_the_host() -> None:
    with Watch() as watch:
        one = judge.Judged(Request("a", (1,), KINDS[0]), judge.Fence("a", 0, 0, 1), None, 0)
        judge.judge(torch.zeros(1, 9, device=FAR), [one])
    assert (watch.sent, watch.fetched) == (1, 1)
