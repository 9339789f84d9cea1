"""Messages to types and back, and everything that is refused on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark.errors import InvalidRequestError, ProtocolError
from dspark.pb import draft_pb2, scheduler_pb2
from dspark.scheduling.calibration import CalibrationTable
from dspark.scheduling.step_table import StepTimeTable
from dspark.types import (
    MAX_SEED,
    RAW_SCALES,
    BlockOutcomes,
    BlockProposal,
    ClassLoad,
    DraftWork,
    Fence,
    Request,
    ResyncRequest,
    SamplingParams,
    Scale,
    Scales,
    StepPlan,
    StepReport,
    VerificationPolicy,
    VerifyMode,
)
from dspark.wire import bounds, drafts, plans, requests, step_times

WIDTH, VOCAB = 6, 100
float32 = st.floats(0.0, 100.0, width=32)
samplings = st.builds(
    SamplingParams,
    temperature=float32,
    top_k=st.integers(0, 1000),
    top_p=st.floats(0.125, 1.0, width=32),
    max_tokens=st.integers(1, 2**31),
    seed=st.integers(0, MAX_SEED),
    stop_token_ids=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    mode=st.sampled_from(VerifyMode),
    speculate=st.booleans(),
)
fences = st.builds(
    Fence,
    session=st.text(min_size=1, max_size=20),
    epoch=st.integers(0, 2**32 - 1),
    round=st.integers(0, 2**32 - 1),
    committed_len=st.integers(1, bounds.MAX_POSITION),
)


@given(st.text(min_size=1, max_size=20), st.lists(st.integers(0, 2**32 - 1)), samplings)
def test_requests_round_trip(name: str, prompt: list[int], sampling: SamplingParams) -> None:
    request = Request(name, tuple(prompt), sampling, epoch=3, service_class="batch")
    assert requests.request_from_pb(requests.request_to_pb(request, "m")) == request


@given(fences, st.integers(0, 5), st.integers(0, 64), samplings)
def test_work_round_trips(fence: Fence, rows: int, block: int, sampling: SamplingParams) -> None:
    features = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows))
    work = DraftWork(fence, 7, features.bfloat16(), 5, block, sampling)
    back = drafts.work_from_pb(drafts.work_to_pb(work), WIDTH, VOCAB)
    assert torch.equal(back.features, work.features)
    assert replace(back, features=work.features) == work


@given(fences, st.lists(st.integers(0, VOCAB - 1), max_size=9))
def test_work_of_token_ids_round_trips(fence: Fence, tokens: list[int]) -> None:
    ids = torch.tensor(tokens, dtype=torch.int64)
    work = DraftWork(fence, 7, torch.zeros(0, 0), 5, 4, SamplingParams(), ids)
    back = drafts.work_from_pb(drafts.work_to_pb(work), 0, VOCAB)
    assert back.token_ids is not None
    assert back.context.tolist() == tokens
    assert replace(back, features=work.features, token_ids=ids) == work


@given(fences, st.integers(1, 5), st.integers(0, 8))
def test_proposals_round_trip(fence: Fence, size: int, k: int) -> None:
    rng = np.random.default_rng(size * 10 + k)
    law = rng.random((size, k)).astype(np.float32)
    proposal = BlockProposal(
        fence,
        rng.integers(0, VOCAB, size),
        rng.random(size).astype(np.float32),
        np.stack([rng.permutation(VOCAB)[:k] for _ in range(size)]) if k else None,
        law / law.sum(1, keepdims=True) if k else None,
    )
    back = drafts.proposal_from_pb(drafts.proposal_to_pb(proposal), VOCAB)
    assert back.fence == fence
    for name in ("token_ids", "confidences", "candidate_ids", "candidate_probs"):
        np.testing.assert_array_equal(getattr(back, name), getattr(proposal, name))


def test_plans_and_resyncs_round_trip() -> None:
    plan = StepPlan(4, VerificationPolicy.FIXED, 5, 6, 2.5, draft_by_request=True, max_blocks=7)
    assert plans.plan_from_pb(plans.plan_to_pb(plan)) == plan
    resync = ResyncRequest("s", 1, 2)
    assert drafts.resync_from_pb(drafts.resync_to_pb(resync)) == resync


def good_work() -> draft_pb2.DraftWork:
    work = DraftWork(Fence("s", 0, 0, 3), 0, torch.zeros(2, WIDTH), 5, 4, SamplingParams())
    return drafts.work_to_pb(work)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda m: setattr(m, "features", b"odd"), "whole rows of 12 bytes"),
        (lambda m: setattr(m, "block_size", 65), "block_size"),
        (lambda m: setattr(m, "anchor_token_id", VOCAB), "anchor_token_id"),
        (lambda m: setattr(m, "feature_start", 2**32 - 1), "position"),
        (lambda m: setattr(m.fence, "session", ""), "session"),
        (lambda m: setattr(m.fence, "session", "x" * 129), "session"),
        (lambda m: setattr(m.fence, "committed_len", 0), "committed_len"),
        (lambda m: setattr(m.sampling, "top_p", 0.0), "top_p"),
        (lambda m: setattr(m.sampling, "temperature", float("nan")), "temperature"),
        (lambda m: setattr(m.sampling, "mode", 9), "mode 9"),
        (lambda m: m.token_ids.append(1), "without token ids"),
    ],
)
def test_work_outside_the_contract_is_refused(spoil: Callable[[Any], None], match: str) -> None:
    message = good_work()
    spoil(message)
    with pytest.raises(ProtocolError, match=match):
        drafts.work_from_pb(message, WIDTH, VOCAB)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda m: m.token_ids.append(VOCAB), f"below {VOCAB}"),
        (lambda m: setattr(m, "features", b"odd"), "no features"),
        (lambda m: setattr(m, "feature_start", bounds.MAX_POSITION - 1), "position"),
    ],
)
def test_token_ids_outside_the_contract_are_refused(
    spoil: Callable[[Any], None], match: str
) -> None:
    ids = torch.tensor([1, 2])
    work = DraftWork(Fence("s", 0, 0, 3), 0, torch.zeros(0, 0), 5, 4, SamplingParams(), ids)
    message = drafts.work_to_pb(work)
    spoil(message)
    with pytest.raises(ProtocolError, match=match):
        drafts.work_from_pb(message, 0, VOCAB)


def good_proposal() -> draft_pb2.BlockProposal:
    ids = np.array([[1, 2], [3, 4]])
    probs = np.full((2, 2), 0.5, dtype=np.float32)
    confidences = np.array([0.5, 0.5], dtype=np.float32)
    return drafts.proposal_to_pb(
        BlockProposal(Fence("s", 0, 0, 3), np.array([1, 3]), confidences, ids, probs)
    )


def law(*values: float) -> bytes:
    return np.array(values, dtype="<f4").tobytes()


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda m: m.ClearField("token_ids"), "tokens"),
        (lambda m: m.token_ids.extend([1] * 64), "tokens"),
        (lambda m: m.confidences.append(0.5), "confidences"),
        (lambda m: m.confidences.__setitem__(0, float("nan")), "confidences"),
        (lambda m: m.confidences.__setitem__(0, 1.5), "confidences"),
        (lambda m: m.token_ids.__setitem__(0, VOCAB), "token_ids"),
        (lambda m: setattr(m, "candidates", 3), "bytes"),
        (lambda m: setattr(m, "candidates", 2**31), "candidates"),
        (lambda m: setattr(m, "candidate_probs", law(0.5, 0.5, 0.9, 0.5)), "laws"),
        (lambda m: setattr(m, "candidate_probs", law(0.5, 0.5, 1.5, -0.5)), "laws"),
        (lambda m: setattr(m, "candidate_probs", law(0.5, 0.5, float("nan"), 1)), "laws"),
        (lambda m: setattr(m, "candidate_ids", np.array([1, 1, 3, 4], "<u4").tobytes()), "differ"),
        (lambda m: setattr(m, "candidate_ids", np.array([1, 2, 3, VOCAB], "<u4").tobytes()), "id"),
    ],
)
def test_proposals_outside_the_contract_are_refused(
    spoil: Callable[[Any], None], match: str
) -> None:
    message = good_proposal()
    spoil(message)
    with pytest.raises(ProtocolError, match=match):
        drafts.proposal_from_pb(message, VOCAB)


def test_a_request_needs_a_name_and_a_known_mode() -> None:
    message = requests.request_to_pb(Request("r", (1,)), "m")
    message.request_id = ""
    with pytest.raises(InvalidRequestError, match="request_id"):
        requests.request_from_pb(message)
    message.request_id = "r"
    message.sampling.mode = 12  # type: ignore[assignment]
    with pytest.raises(InvalidRequestError, match="mode 12"):
        requests.request_from_pb(message)


def test_a_plan_needs_a_policy() -> None:
    message = plans.plan_to_pb(StepPlan())
    message.policy = 0  # type: ignore[assignment]
    with pytest.raises(ProtocolError, match="policy"):
        plans.plan_from_pb(message)


TABLE = CalibrationTable(
    Scales(Scale((1.5, 0.7), (0.1, -0.2)), Scale((0.5, 1.0), (2.0, 0.0))), 2, "w", 1000, epoch=4
)


def test_a_calibration_table_travels_with_a_plan() -> None:
    assert plans.table_from_pb(plans.plan_to_pb(StepPlan(), TABLE).calibration) == TABLE
    assert not plans.plan_to_pb(StepPlan()).HasField("calibration")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda m: m.sampled_scale.temperatures.append(1.0), "sampled scale"),
        (lambda m: m.sampled_scale.temperatures.__setitem__(0, 0.0), "sampled scale"),
        (lambda m: m.greedy_scale.temperatures.__setitem__(0, float("nan")), "greedy scale"),
        (lambda m: m.greedy_scale.biases.__setitem__(0, 9.0), "greedy scale"),
        (lambda m: m.greedy_scale.biases.pop(), "greedy scale"),
        (lambda m: m.ClearField("greedy_scale"), "greedy scale"),
        (lambda m: setattr(m, "block_size", 3), "sampled scale"),
        (lambda m: setattr(m, "block_size", 2**31), "block_size"),
        (lambda m: setattr(m, "drafter_fingerprint", ""), "fingerprint"),
        (lambda m: setattr(m, "drafter_fingerprint", "x" * 129), "fingerprint"),
        (lambda m: setattr(m, "epoch", 2**64 - 1), "epoch"),
    ],
)
def test_tables_outside_the_contract_are_refused(spoil: Callable[[Any], None], match: str) -> None:
    message = plans.table_to_pb(TABLE)
    spoil(message)
    with pytest.raises(ProtocolError, match=match):
        plans.table_from_pb(message)


def report(outcomes: BlockOutcomes | None) -> scheduler_pb2.StepReport:
    counts = dict.fromkeys(("decode_requests", "waiting_requests", "tokens", "drafted"), 0)
    made = StepReport(
        7, 1.0, 0.0, **counts, prefill_tokens=0, verified_by_position=(1,),
        accepted_by_position=(0,), committed=1, free_pages=1, total_pages=1,
        calibration_epoch=4, calibrations_refused=2, outcomes=outcomes,
        classes=(ClassLoad("fast", 5, 4, 3, 2),),
        predicted_tokens=2.5, predicted_ms=10.25, decoded_tokens=3, round_ms=12.5,
    )  # fmt: skip
    return plans.report_to_pb(made, "v")


@given(st.integers(1, 32), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_outcomes_round_trip(count: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    verified = rng.integers(0, size + 1, count)
    confidences = rng.random((count, size)).astype(np.float32)
    confidences[np.arange(size) >= verified[:, None]] = np.nan
    scales = Scales(greedy=Scale((1.5,), (0.5,)))
    kinds = rng.random(count) < 0.5
    outcomes = BlockOutcomes(confidences, verified, rng.integers(0, verified + 1), kinds, scales)
    message = report(outcomes)
    assert (message.calibration_epoch, message.calibrations_refused) == (4, 2)
    assert (message.predicted_tokens, message.predicted_ms) == (2.5, 10.25)
    assert (message.decoded_tokens, message.round_ms) == (3, 12.5)
    back = plans.outcomes_from_pb(message.outcomes)
    for name in ("confidences", "verified", "accepted", "greedy"):
        np.testing.assert_array_equal(getattr(back, name), getattr(outcomes, name))
    assert back.scales == scales
    assert message.outcomes.ByteSize() <= count * (4 * size + 3) + 64
    assert not report(None).HasField("outcomes")
    (load,) = message.classes
    assert (load.name, load.requests, load.floors) == ("fast", 5, 4)
    assert (load.floors_missed, load.late_first_tokens) == (3, 2)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda m: setattr(m, "block_size", 0), "blocks"),
        (lambda m: setattr(m, "block_size", 65), "blocks"),
        (lambda m: setattr(m, "block_size", 1), "verified"),
        (lambda m: setattr(m, "verified", b""), "blocks"),
        (lambda m: setattr(m, "verified", b"\1" * 257), "blocks"),
        (lambda m: setattr(m, "verified", b"\1\3"), "verified"),
        (lambda m: setattr(m, "accepted", b"\0"), "accepted"),
        (lambda m: setattr(m, "accepted", b"\2\0"), "accepted"),
        (lambda m: setattr(m, "confidences", law(0.5, 0.5)), "bytes"),
        (lambda m: setattr(m, "confidences", law(0.5, 0.5, 1.5)), "0..1"),
        (lambda m: setattr(m, "confidences", law(0.5, 0.5, float("nan"))), "0..1"),
        (lambda m: setattr(m, "greedy", b"\0"), "greedy"),
        (lambda m: setattr(m, "greedy", b"\0\2"), "greedy"),
        (lambda m: m.sampled_scale.temperatures.extend([1.0] * 3), "scale"),
        (lambda m: m.greedy_scale.temperatures.append(0.0), "scale"),
        (lambda m: m.greedy_scale.biases.append(float("nan")), "scale"),
    ],
)
def test_outcomes_outside_the_contract_are_refused(
    spoil: Callable[[Any], None], match: str
) -> None:
    confidences = np.array([[0.5, np.nan], [0.5, 0.5]], dtype=np.float32)
    fate = np.array([1, 2]), np.array([1, 0]), np.zeros(2, dtype=np.bool_)
    message = report(BlockOutcomes(confidences, *fate, RAW_SCALES)).outcomes
    spoil(message)
    with pytest.raises(ProtocolError, match=match):
        plans.outcomes_from_pb(message)


STEP_TIMES = StepTimeTable(
    (1, 4), (1, 2, 6), (64,), (((1.0, 2.0, 3.0), (1.5, 2.5, 1 / 3 + 3.0)),), (4, 8), "f"
)


def test_step_times_round_trip() -> None:
    assert step_times.step_times_from_pb(step_times.step_times_to_pb(STEP_TIMES)) == STEP_TIMES


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda m: m.step_ms.pop(), "as many times"),
        (lambda m: m.rows.append(9), "as many times"),
        (lambda m: m.contexts.pop(), "as many times"),
        (lambda m: m.contexts.extend(range(65, 65 + 2**16)), "as many times"),
        (lambda m: m.requests.reverse(), "rising"),
        (lambda m: m.padded.append(1 << 31), "rising"),
        (lambda m: m.step_ms.reverse(), "never fall"),
        (lambda m: m.step_ms.__setitem__(5, float("inf")), "step times"),
        (lambda m: m.Clear(), "rising"),
    ],
)
def test_step_times_outside_the_contract_are_refused(
    spoil: Callable[[Any], None], match: str
) -> None:
    message = step_times.step_times_to_pb(STEP_TIMES)
    spoil(message)
    with pytest.raises(ProtocolError, match=match):
        step_times.step_times_from_pb(message)
