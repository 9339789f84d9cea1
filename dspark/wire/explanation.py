"""From a verifier to whoever asks what its steps did and why."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from dspark.config import MAX_BLOCK_SIZE
from dspark.errors import ProtocolError
from dspark.pb import verifier_pb2 as pb
from dspark.scheduling.explanation import (
    KEPT_STEPS,
    SHOWN_REQUESTS,
    Basis,
    RequestExplanation,
    StepExplanation,
)
from dspark.wire.bounds import MAX_ID_CHARS
from dspark.wire.plans import policy_from_pb, policy_to_pb

_BASIS_NUMBERS: dict[Basis, Any] = {
    basis: pb.StepBasis.Value(f"STEP_BASIS_{basis.name}")  # a basis without a number fails here
    for basis in Basis
}
_BASES: dict[int, Basis] = {number: basis for basis, number in _BASIS_NUMBERS.items()}


def steps_to_pb(steps: Iterable[StepExplanation]) -> pb.ExplainStepsResponse:
    """The steps as a message."""
    return pb.ExplainStepsResponse(steps=map(_step_to_pb, steps))


def steps_from_pb(message: pb.ExplainStepsResponse) -> list[StepExplanation]:
    """The steps; ProtocolError if they break the contract."""
    if len(message.steps) > KEPT_STEPS:
        raise ProtocolError(f"at most {KEPT_STEPS} steps are told; got {len(message.steps)}")
    return list(map(_step_from_pb, message.steps))


def _step_to_pb(step: StepExplanation) -> pb.StepExplanation:
    return pb.StepExplanation(
        step=step.step,
        age_ms=round(step.age_s * 1000),
        plan_epoch=step.plan_epoch,
        policy=policy_to_pb(step.policy),
        basis=_BASIS_NUMBERS[step.basis],
        looked_up=step.looked_up,
        ceiling=step.ceiling,
        prompt_tokens=step.prompt_tokens,
        decoding=step.decoding,
        requests=[
            pb.RequestExplanation(
                request_id=request.request_id,
                survivals=request.survivals,
                verified=request.verified,
                accepted=request.accepted,
                committed=request.committed,
            )
            for request in step.requests
        ],
        predicted_tokens=step.predicted_tokens,
        predicted_ms=step.predicted_ms,
        committed=step.committed,
        round_ms=step.round_ms,
        step_ms=step.step_ms,
        draft_wait_ms=step.draft_wait_ms,
    )


def _step_from_pb(message: pb.StepExplanation) -> StepExplanation:
    basis = _BASES.get(message.basis)
    if basis is None:
        raise ProtocolError(f"a step needs a basis that is known here; got {message.basis}")
    if len(message.requests) > SHOWN_REQUESTS:
        raise ProtocolError(
            f"at most {SHOWN_REQUESTS} requests of a step are told; got {len(message.requests)}"
        )
    times = (message.predicted_tokens, message.predicted_ms, message.round_ms, message.step_ms,
             message.draft_wait_ms)  # fmt: skip
    if not all(math.isfinite(value) and value >= 0 for value in times):
        raise ProtocolError(f"times and expected tokens are finite and from 0 on; got {times}")
    return StepExplanation(
        step=message.step,
        age_s=message.age_ms / 1000,
        plan_epoch=message.plan_epoch,
        policy=policy_from_pb(message.policy),
        basis=basis,
        looked_up=message.looked_up,
        ceiling=message.ceiling if message.HasField("ceiling") else None,
        prompt_tokens=message.prompt_tokens,
        decoding=message.decoding,
        requests=tuple(map(_request_from_pb, message.requests)),
        predicted_tokens=(
            message.predicted_tokens if message.HasField("predicted_tokens") else None
        ),
        predicted_ms=message.predicted_ms if message.HasField("predicted_ms") else None,
        committed=message.committed,
        round_ms=message.round_ms if message.HasField("round_ms") else None,
        step_ms=message.step_ms,
        draft_wait_ms=message.draft_wait_ms,
    )


def _request_from_pb(message: pb.RequestExplanation) -> RequestExplanation:
    survivals = tuple(message.survivals)
    if not 0 < len(message.request_id) <= MAX_ID_CHARS:
        raise ProtocolError(
            f"a request's name has 1 to {MAX_ID_CHARS} characters; got {len(message.request_id)}"
        )
    if len(survivals) > MAX_BLOCK_SIZE or not all(0 <= value <= 1 for value in survivals):
        raise ProtocolError(f"survivals are up to {MAX_BLOCK_SIZE} values in 0..1; got {survivals}")
    if not message.accepted <= message.verified <= len(survivals):
        raise ProtocolError(
            f"a request needs accepted ≤ verified ≤ {len(survivals)}; got {message.accepted} of "
            f"{message.verified}"
        )
    return RequestExplanation(
        request_id=message.request_id,
        survivals=survivals,
        verified=message.verified,
        accepted=message.accepted,
        committed=message.committed,
    )
