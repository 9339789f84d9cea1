"""Between a verifier and the scheduler: reports of steps, plans, calibrations."""

from __future__ import annotations

import numpy as np

from dspark.config import MAX_BLOCK_SIZE
from dspark.errors import CalibrationError, ProtocolError
from dspark.pb import scheduler_pb2
from dspark.scheduling.calibration import CalibrationTable, scale_can_be
from dspark.types import (
    BlockOutcomes,
    Scale,
    Scales,
    StepPlan,
    StepReport,
    VerificationPolicy,
)
from dspark.wire.bounds import MAX_OUTCOMES

_POLICY_NUMBERS = {
    VerificationPolicy.ADAPTIVE: scheduler_pb2.VERIFICATION_POLICY_ADAPTIVE,
    VerificationPolicy.FIXED: scheduler_pb2.VERIFICATION_POLICY_FIXED,
    VerificationPolicy.OFF: scheduler_pb2.VERIFICATION_POLICY_OFF,
}
_POLICIES: dict[int, VerificationPolicy] = {
    number: policy for policy, number in _POLICY_NUMBERS.items()
}


def policy_to_pb(policy: VerificationPolicy) -> scheduler_pb2.VerificationPolicy:
    """A policy as an enum value."""
    return _POLICY_NUMBERS[policy]


def policy_from_pb(number: int) -> VerificationPolicy:
    """A policy; ProtocolError if it is none."""
    policy = _POLICIES.get(number)
    if policy is None:
        raise ProtocolError(f"a plan needs a policy; got {number}")
    return policy


def report_to_pb(report: StepReport, incarnation: str) -> scheduler_pb2.StepReport:
    """A step report as a message."""
    return scheduler_pb2.StepReport(
        incarnation=incarnation,
        step=report.step,
        step_ms=report.step_ms,
        draft_wait_ms=report.draft_wait_ms,
        decode_requests=report.decode_requests,
        waiting_requests=report.waiting_requests,
        tokens=report.tokens,
        prefill_tokens=report.prefill_tokens,
        drafted=report.drafted,
        verified_by_position=report.verified_by_position,
        accepted_by_position=report.accepted_by_position,
        committed=report.committed,
        free_pages=report.free_pages,
        total_pages=report.total_pages,
        calibration_epoch=report.calibration_epoch,
        calibrations_refused=report.calibrations_refused,
        outcomes=None if report.outcomes is None else _outcomes_to_pb(report.outcomes),
        classes=[
            scheduler_pb2.ClassLoad(
                name=load.name,
                requests=load.requests,
                floors=load.floors,
                floors_missed=load.floors_missed,
                late_first_tokens=load.late_first_tokens,
            )
            for load in report.classes
        ],
        predicted_tokens=report.predicted_tokens,
        predicted_ms=report.predicted_ms,
        decoded_tokens=report.decoded_tokens,
        round_ms=report.round_ms,
    )


def _outcomes_to_pb(outcomes: BlockOutcomes) -> scheduler_pb2.BlockOutcomes:
    confidences, verified = outcomes.confidences, outcomes.verified
    told = confidences[np.arange(confidences.shape[1]) < verified[:, None]]
    return scheduler_pb2.BlockOutcomes(
        block_size=confidences.shape[1],
        verified=verified.astype(np.uint8).tobytes(),
        accepted=outcomes.accepted.astype(np.uint8).tobytes(),
        confidences=told.astype("<f4").tobytes(),
        greedy=outcomes.greedy.astype(np.uint8).tobytes(),
        sampled_scale=_scale_to_pb(outcomes.scales.sampled),
        greedy_scale=_scale_to_pb(outcomes.scales.greedy),
    )


def outcomes_from_pb(message: scheduler_pb2.BlockOutcomes) -> BlockOutcomes:
    """Outcomes as the scheduler takes them; ProtocolError if they break the contract."""
    size, count = message.block_size, len(message.verified)
    if not 0 < size <= MAX_BLOCK_SIZE or not 0 < count <= MAX_OUTCOMES:
        raise ProtocolError(
            f"outcomes are of 1 to {MAX_OUTCOMES} blocks of 1 to {MAX_BLOCK_SIZE} tokens; got "
            f"{count} blocks of {size}"
        )
    verified = np.frombuffer(message.verified, dtype=np.uint8).astype(np.int64)
    accepted = np.frombuffer(message.accepted, dtype=np.uint8).astype(np.int64)
    if len(accepted) != count or (accepted > verified).any() or (verified > size).any():
        raise ProtocolError(
            f"each block needs 0 ≤ accepted ≤ verified ≤ {size}; got {accepted.tolist()} of "
            f"{verified.tolist()}"
        )
    if len(message.confidences) != 4 * verified.sum():
        raise ProtocolError(
            f"{verified.sum()} verified tokens need 4 bytes of confidence each; got "
            f"{len(message.confidences)} bytes"
        )
    told = np.frombuffer(message.confidences, dtype="<f4")
    if not ((told >= 0) & (told <= 1)).all():
        raise ProtocolError("confidences of outcomes must lie in 0..1")
    greedy = np.frombuffer(message.greedy, dtype=np.uint8)
    if len(greedy) != count or (greedy > 1).any():
        raise ProtocolError(f"each block is greedy, 1, or not, 0; got {greedy.tolist()}")
    scales = _scales_from_pb(message)
    for scale in (scales.sampled, scales.greedy):
        if max(len(scale.temperatures), len(scale.biases)) > size or not scale_can_be(scale):
            raise ProtocolError(f"a scale of outcomes cannot be {scale}")
    confidences = np.full((count, size), np.nan, dtype=np.float32)
    confidences[np.arange(size) < verified[:, None]] = told
    return BlockOutcomes(confidences, verified, accepted, greedy.astype(np.bool_), scales)


def _scale_to_pb(scale: Scale) -> scheduler_pb2.Scale:
    return scheduler_pb2.Scale(temperatures=scale.temperatures, biases=scale.biases)


def _scales_from_pb(
    message: scheduler_pb2.BlockOutcomes | scheduler_pb2.CalibrationTable,
) -> Scales:
    sampled, greedy = message.sampled_scale, message.greedy_scale
    return Scales(
        sampled=Scale(tuple(sampled.temperatures), tuple(sampled.biases)),
        greedy=Scale(tuple(greedy.temperatures), tuple(greedy.biases)),
    )


def table_to_pb(table: CalibrationTable) -> scheduler_pb2.CalibrationTable:
    """A calibration table as a message."""
    return scheduler_pb2.CalibrationTable(
        sampled_scale=_scale_to_pb(table.scales.sampled),
        greedy_scale=_scale_to_pb(table.scales.greedy),
        block_size=table.block_size,
        drafter_fingerprint=table.drafter_fingerprint,
        blocks=table.blocks,
        epoch=table.epoch,
    )


def table_from_pb(message: scheduler_pb2.CalibrationTable) -> CalibrationTable:
    """A calibration table; ProtocolError if it breaks the contract."""
    try:
        return CalibrationTable(
            scales=_scales_from_pb(message),
            block_size=message.block_size,
            drafter_fingerprint=message.drafter_fingerprint,
            blocks=message.blocks,
            epoch=message.epoch,
        )
    except CalibrationError as error:
        raise ProtocolError(str(error)) from error


def plan_to_pb(
    plan: StepPlan, calibration: CalibrationTable | None = None
) -> scheduler_pb2.StepPlan:
    """A plan as a message, and the calibration table that goes with it."""
    return scheduler_pb2.StepPlan(
        epoch=plan.epoch,
        policy=policy_to_pb(plan.policy),
        block_size=plan.block_size,
        max_draft_tokens=plan.max_draft_tokens,
        draft_by_request=plan.draft_by_request,
        valid_for_ms=round(plan.valid_for_s * 1000),
        calibration=None if calibration is None else table_to_pb(calibration),
        max_blocks=plan.max_blocks,
    )


def plan_from_pb(message: scheduler_pb2.StepPlan) -> StepPlan:
    """A plan as the verifier takes it; ProtocolError if it breaks the contract."""
    policy = policy_from_pb(message.policy)
    if message.block_size > MAX_BLOCK_SIZE:
        raise ProtocolError(
            f"block_size must be at most {MAX_BLOCK_SIZE}; got {message.block_size}"
        )
    return StepPlan(
        epoch=message.epoch,
        policy=policy,
        block_size=message.block_size,
        max_draft_tokens=message.max_draft_tokens,
        draft_by_request=message.draft_by_request,
        valid_for_s=message.valid_for_ms / 1000,
        max_blocks=message.max_blocks,
    )
