"""Requests and what comes of them: what callers and the gateway say to verifiers, and hear."""

from __future__ import annotations

from dspark.errors import InvalidRequestError, ProtocolError
from dspark.pb import common_pb2, verifier_pb2
from dspark.types import FinishReason, Request, SamplingParams, VerificationResult, VerifyMode
from dspark.wire.bounds import MAX_DRAFTED, MAX_ID_CHARS

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
        service_class=request.service_class,
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
        service_class=message.service_class,
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
    """One step's tokens, as the gateway takes them; ProtocolError if they break the contract."""
    counts = message.accepted, message.verified, message.drafted
    if not message.accepted <= message.verified <= message.drafted <= MAX_DRAFTED:
        raise ProtocolError(
            f"a step needs accepted ≤ verified ≤ drafted ≤ {MAX_DRAFTED}; got {counts}"
        )
    if not message.accepted <= len(message.token_ids):
        raise ProtocolError(
            f"{message.accepted} drafted tokens were accepted, of {len(message.token_ids)} in all"
        )
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
