"""Between our types and messages. Everything that comes in is checked here, and bounded.

A message that breaks the contract raises ProtocolError (between services) or InvalidRequestError
(from a caller), naming the field, what was got and what is allowed.
"""

from __future__ import annotations

import numpy as np
import torch

from dspark.errors import CalibrationError, InvalidRequestError, ProtocolError
from dspark.pb import common_pb2, draft_pb2, scheduler_pb2, verifier_pb2
from dspark.scheduling.calibration import CalibrationTable, temperature_can_be
from dspark.types import (
    BlockOutcomes,
    BlockProposal,
    DraftWork,
    Fence,
    FinishReason,
    FloatArray,
    IntArray,
    Request,
    ResyncRequest,
    SamplingParams,
    StepPlan,
    StepReport,
    VerificationPolicy,
    VerificationResult,
    VerifyMode,
)

MAX_ID_CHARS = 128
MAX_BLOCK_SIZE = 64
MAX_CANDIDATES = 4096
MAX_POSITION = 1 << 24
MAX_WORKS = 4096
MAX_OUTCOMES = 256  # blocks in one report
_LAW_TOLERANCE = 1e-3  # on the sum of a position's probabilities, float32 over many candidates

_MODES: dict[int, VerifyMode] = {
    common_pb2.VERIFY_MODE_UNSPECIFIED: VerifyMode.REJECTION,
    common_pb2.VERIFY_MODE_REJECTION: VerifyMode.REJECTION,
    common_pb2.VERIFY_MODE_COUPLED: VerifyMode.COUPLED,
}
_MODE_NUMBERS = {
    VerifyMode.REJECTION: common_pb2.VERIFY_MODE_REJECTION,
    VerifyMode.COUPLED: common_pb2.VERIFY_MODE_COUPLED,
}
_FINISH_NUMBERS = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: common_pb2.FINISH_REASON_ABORT,
}
_FINISHES: dict[int, FinishReason] = {number: reason for reason, number in _FINISH_NUMBERS.items()}
_POLICY_NUMBERS = {
    VerificationPolicy.ADAPTIVE: scheduler_pb2.VERIFICATION_POLICY_ADAPTIVE,
    VerificationPolicy.FIXED: scheduler_pb2.VERIFICATION_POLICY_FIXED,
    VerificationPolicy.OFF: scheduler_pb2.VERIFICATION_POLICY_OFF,
}
_POLICIES: dict[int, VerificationPolicy] = {
    number: policy for policy, number in _POLICY_NUMBERS.items()
}


# -- requests -----------------------------------------------------------------------------------


def verify_mode(number: int) -> VerifyMode:
    """A mode by its number; InvalidRequestError for one that does not exist."""
    if number not in _MODES:
        raise InvalidRequestError(
            f"mode {number} is unknown; use VERIFY_MODE_REJECTION (1) or VERIFY_MODE_COUPLED (2)",
            param="mode",
        )
    return _MODES[number]


def sampling_to_pb(sampling: SamplingParams) -> common_pb2.Sampling:
    """SamplingParams as a message."""
    return common_pb2.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        stop_token_ids=sampling.stop_token_ids,
        mode=_MODE_NUMBERS[sampling.mode],
        speculate=sampling.speculate,
    )


def sampling_from_pb(message: common_pb2.Sampling) -> SamplingParams:
    """A message as SamplingParams; InvalidRequestError if a value is out of range."""
    return SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        max_tokens=message.max_tokens,
        seed=message.seed,
        stop_token_ids=tuple(message.stop_token_ids),
        mode=verify_mode(message.mode),
        speculate=message.speculate,
    )


def request_to_pb(request: Request, model: str) -> verifier_pb2.GenerateTokensRequest:
    """A request to a verifier."""
    return verifier_pb2.GenerateTokensRequest(
        request_id=request.id,
        epoch=request.epoch,
        model=model,
        prompt_token_ids=request.prompt_token_ids,
        sampling=sampling_to_pb(request.sampling),
    )


def request_from_pb(message: verifier_pb2.GenerateTokensRequest) -> Request:
    """A verifier's view of a request; InvalidRequestError if it cannot be one."""
    if not 0 < len(message.request_id) <= MAX_ID_CHARS:
        raise InvalidRequestError(
            f"request_id must have 1 to {MAX_ID_CHARS} characters; got {len(message.request_id)}",
            param="request_id",
        )
    return Request(
        id=message.request_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=sampling_from_pb(message.sampling),
        epoch=message.epoch,
    )


def result_to_pb(result: VerificationResult) -> verifier_pb2.GenerateTokensResponse:
    """One step's tokens."""
    return verifier_pb2.GenerateTokensResponse(
        token_ids=result.token_ids,
        drafted=result.drafted,
        verified=result.verified,
        accepted=result.accepted,
        finish_reason=finish_to_pb(result.finish_reason),
    )


def result_from_pb(
    request_id: str, message: verifier_pb2.GenerateTokensResponse
) -> VerificationResult:
    """One step's tokens, as the gateway sees them."""
    return VerificationResult(
        request_id=request_id,
        token_ids=tuple(message.token_ids),
        drafted=message.drafted,
        verified=message.verified,
        accepted=message.accepted,
        finish_reason=_FINISHES.get(message.finish_reason),
    )


def finish_to_pb(reason: FinishReason | None) -> common_pb2.FinishReason:
    """A finish reason's number; unspecified while there is none."""
    if reason is None:
        return common_pb2.FINISH_REASON_UNSPECIFIED
    return _FINISH_NUMBERS[reason]


# -- verifier and draft ---------------------------------------------------------------------------


def work_to_pb(work: DraftWork) -> draft_pb2.DraftWork:
    """Work with its features as bfloat16 rows, or its token ids."""
    rows = work.features.to(device="cpu", dtype=torch.bfloat16).contiguous()
    return draft_pb2.DraftWork(
        fence=_fence_to_pb(work.fence),
        feature_start=work.feature_start,
        features=rows.view(torch.uint8).numpy().tobytes() if rows.numel() else b"",
        anchor_token_id=work.anchor_token_id,
        block_size=work.block_size,
        sampling=sampling_to_pb(work.sampling),
        token_ids=None if work.token_ids is None else work.token_ids.tolist(),
    )


def work_from_pb(message: draft_pb2.DraftWork, width: int, vocab_size: int) -> DraftWork:
    """Work as the draft service takes it; ProtocolError if it breaks the contract.

    `width`: of the features that the drafter reads; 0: it reads token ids.
    """
    fence = _fence_from_pb(message.fence)
    features, token_ids = _context_from_pb(message, width, vocab_size)
    if message.block_size > MAX_BLOCK_SIZE:
        raise ProtocolError(
            f"block_size must be at most {MAX_BLOCK_SIZE}; got {message.block_size}"
        )
    length = len(features if token_ids is None else token_ids)
    if message.feature_start + length > MAX_POSITION:
        raise ProtocolError(f"context reaches past position {MAX_POSITION}")
    if message.anchor_token_id >= vocab_size:
        raise ProtocolError(
            f"anchor_token_id must lie below {vocab_size}; got {message.anchor_token_id}"
        )
    try:
        sampling = sampling_from_pb(message.sampling)
    except InvalidRequestError as error:
        raise ProtocolError(f"sampling: {error}") from error
    return DraftWork(
        fence=fence,
        feature_start=message.feature_start,
        features=features,
        anchor_token_id=message.anchor_token_id,
        block_size=message.block_size,
        sampling=sampling,
        token_ids=token_ids,
    )


def _context_from_pb(
    message: draft_pb2.DraftWork, width: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:  # features [n, d], token ids [n]
    if not width:
        token_ids = torch.tensor(message.token_ids, dtype=torch.int64)
        if message.features or (len(token_ids) and int(token_ids.max()) >= vocab_size):
            raise ProtocolError(
                f"this drafter reads token ids below {vocab_size} and no features; got "
                f"{len(message.features)} bytes of features and {len(token_ids)} ids, the largest "
                f"{max(message.token_ids, default=0)}"
            )
        return torch.empty(0, 0), token_ids
    row_bytes = 2 * width
    if message.token_ids or len(message.features) % row_bytes:
        raise ProtocolError(
            f"features must be whole rows of {row_bytes} bytes, without token ids; got "
            f"{len(message.features)} bytes and {len(message.token_ids)} ids"
        )
    # bytearray: torch wants memory that it may write to
    raw = torch.frombuffer(bytearray(message.features), dtype=torch.bfloat16) \
        if message.features else torch.empty(0, dtype=torch.bfloat16)  # fmt: skip
    return raw.view(-1, width), None


def proposal_to_pb(proposal: BlockProposal) -> draft_pb2.BlockProposal:
    """A block as a message."""
    message = draft_pb2.BlockProposal(
        fence=_fence_to_pb(proposal.fence),
        token_ids=proposal.token_ids.tolist(),
        confidences=proposal.confidences.tolist(),
    )
    if proposal.candidate_ids is not None and proposal.candidate_probs is not None:
        message.candidates = proposal.candidate_ids.shape[1]
        message.candidate_ids = proposal.candidate_ids.astype("<u4").tobytes()
        message.candidate_probs = proposal.candidate_probs.astype("<f4").tobytes()
    return message


def proposal_from_pb(message: draft_pb2.BlockProposal, vocab_size: int) -> BlockProposal:
    """A block as the verifier takes it; ProtocolError if it breaks the contract."""
    size, k = len(message.token_ids), message.candidates
    if not 0 < size <= MAX_BLOCK_SIZE or len(message.confidences) != size:
        raise ProtocolError(
            f"a block needs 1 to {MAX_BLOCK_SIZE} tokens and a confidence for each; got {size} "
            f"tokens and {len(message.confidences)} confidences"
        )
    tokens = np.array(message.token_ids, dtype=np.int64)
    confidences = np.array(message.confidences, dtype=np.float32)
    if int(tokens.max()) >= vocab_size:
        raise ProtocolError(f"token_ids must lie below {vocab_size}; got {int(tokens.max())}")
    if not ((confidences >= 0) & (confidences <= 1)).all():
        raise ProtocolError(f"confidences must lie in 0..1; got {confidences.tolist()}")
    fence = _fence_from_pb(message.fence)
    if not k:
        return BlockProposal(fence, tokens, confidences)
    ids, probs = _law_from_pb(message, size, k, vocab_size)
    return BlockProposal(fence, tokens, confidences, ids, probs)


def _law_from_pb(
    message: draft_pb2.BlockProposal, size: int, k: int, vocab_size: int
) -> tuple[IntArray, FloatArray]:  # [γ, K]
    if k > MAX_CANDIDATES or {len(message.candidate_ids), len(message.candidate_probs)} != {
        4 * size * k
    }:
        raise ProtocolError(
            f"a law of {size} × {k} candidates needs {4 * size * k} bytes of ids and as many of "
            f"probabilities, and at most {MAX_CANDIDATES} candidates; got "
            f"{len(message.candidate_ids)} and {len(message.candidate_probs)} bytes"
        )
    ids = np.frombuffer(message.candidate_ids, dtype="<u4").reshape(size, k).astype(np.int64)
    probs = np.frombuffer(message.candidate_probs, dtype="<f4").reshape(size, k).astype(np.float32)
    if int(ids.max()) >= vocab_size:
        raise ProtocolError(f"candidate_ids must lie below {vocab_size}; got {int(ids.max())}")
    sums = probs.sum(axis=1)
    if (
        not (np.isfinite(probs).all() and (probs >= 0).all())
        or (np.abs(sums - 1.0) > _LAW_TOLERANCE).any()
    ):
        raise ProtocolError(f"candidate_probs must be laws; their sums are {sums.tolist()}")
    if any(len(np.unique(row)) != k for row in ids):
        raise ProtocolError("candidate_ids of one position must differ")
    return ids, probs


def resync_to_pb(resync: ResyncRequest) -> draft_pb2.ResyncRequest:
    """A resync request as a message."""
    return draft_pb2.ResyncRequest(
        session=resync.session, epoch=resync.epoch, have_len=resync.have_len
    )


def resync_from_pb(message: draft_pb2.ResyncRequest) -> ResyncRequest:
    """A resync request; what it names is looked up, so nothing needs checking."""
    return ResyncRequest(message.session, message.epoch, message.have_len)


def _fence_to_pb(fence: Fence) -> draft_pb2.Fence:
    return draft_pb2.Fence(
        session=fence.session,
        epoch=fence.epoch,
        round=fence.round,
        committed_len=fence.committed_len,
    )


def _fence_from_pb(message: draft_pb2.Fence) -> Fence:
    if not 0 < len(message.session) <= MAX_ID_CHARS:
        raise ProtocolError(
            f"session must have 1 to {MAX_ID_CHARS} characters; got {len(message.session)}"
        )
    if not 0 < message.committed_len <= MAX_POSITION:
        raise ProtocolError(
            f"committed_len must lie in 1..{MAX_POSITION}; got {message.committed_len}"
        )
    return Fence(message.session, message.epoch, message.round, message.committed_len)


# -- verifier and scheduler -----------------------------------------------------------------------


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
    )


def _outcomes_to_pb(outcomes: BlockOutcomes) -> scheduler_pb2.BlockOutcomes:
    confidences, verified = outcomes.confidences, outcomes.verified
    told = confidences[np.arange(confidences.shape[1]) < verified[:, None]]
    return scheduler_pb2.BlockOutcomes(
        block_size=confidences.shape[1],
        verified=verified.astype(np.uint8).tobytes(),
        accepted=outcomes.accepted.astype(np.uint8).tobytes(),
        confidences=told.astype("<f4").tobytes(),
        temperatures=outcomes.temperatures,
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
    temperatures = tuple(message.temperatures)
    if len(temperatures) > size or not all(map(temperature_can_be, temperatures)):
        raise ProtocolError(f"temperatures of outcomes cannot be {temperatures}")
    confidences = np.full((count, size), np.nan, dtype=np.float32)
    confidences[np.arange(size) < verified[:, None]] = told
    return BlockOutcomes(confidences, verified, accepted, temperatures)


def table_to_pb(table: CalibrationTable) -> scheduler_pb2.CalibrationTable:
    """A calibration table as a message."""
    return scheduler_pb2.CalibrationTable(
        temperatures=table.temperatures,
        block_size=table.block_size,
        drafter_fingerprint=table.drafter_fingerprint,
        blocks=table.blocks,
        epoch=table.epoch,
    )


def table_from_pb(message: scheduler_pb2.CalibrationTable) -> CalibrationTable:
    """A calibration table; ProtocolError if it breaks the contract."""
    try:
        return CalibrationTable(
            temperatures=tuple(message.temperatures),
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
        policy=_POLICY_NUMBERS[plan.policy],
        block_size=plan.block_size,
        max_draft_tokens=plan.max_draft_tokens,
        valid_for_ms=round(plan.valid_for_s * 1000),
        calibration=None if calibration is None else table_to_pb(calibration),
    )


def plan_from_pb(message: scheduler_pb2.StepPlan) -> StepPlan:
    """A plan as the verifier takes it; ProtocolError if it breaks the contract."""
    policy = _POLICIES.get(message.policy)
    if policy is None:
        raise ProtocolError(f"a plan needs a policy; got {message.policy}")
    if message.block_size > MAX_BLOCK_SIZE:
        raise ProtocolError(
            f"block_size must be at most {MAX_BLOCK_SIZE}; got {message.block_size}"
        )
    return StepPlan(
        epoch=message.epoch,
        policy=policy,
        block_size=message.block_size,
        max_draft_tokens=message.max_draft_tokens,
        valid_for_s=message.valid_for_ms / 1000,
    )
