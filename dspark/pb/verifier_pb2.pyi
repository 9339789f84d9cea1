from dspark.pb import common_pb2 as _common_pb2
from dspark.pb import scheduler_pb2 as _scheduler_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StepBasis(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STEP_BASIS_UNSPECIFIED: _ClassVar[StepBasis]
    STEP_BASIS_CAUSAL: _ClassVar[StepBasis]
    STEP_BASIS_RANKED: _ClassVar[StepBasis]
    STEP_BASIS_GLOBAL: _ClassVar[StepBasis]
    STEP_BASIS_WHOLE: _ClassVar[StepBasis]
    STEP_BASIS_NO_BLOCKS: _ClassVar[StepBasis]
    STEP_BASIS_NOT_ASKED: _ClassVar[StepBasis]
    STEP_BASIS_NO_DRAFTER: _ClassVar[StepBasis]
    STEP_BASIS_UNWANTED: _ClassVar[StepBasis]
    STEP_BASIS_OFF: _ClassVar[StepBasis]
    STEP_BASIS_PROMPTS: _ClassVar[StepBasis]
STEP_BASIS_UNSPECIFIED: StepBasis
STEP_BASIS_CAUSAL: StepBasis
STEP_BASIS_RANKED: StepBasis
STEP_BASIS_GLOBAL: StepBasis
STEP_BASIS_WHOLE: StepBasis
STEP_BASIS_NO_BLOCKS: StepBasis
STEP_BASIS_NOT_ASKED: StepBasis
STEP_BASIS_NO_DRAFTER: StepBasis
STEP_BASIS_UNWANTED: StepBasis
STEP_BASIS_OFF: StepBasis
STEP_BASIS_PROMPTS: StepBasis

class GenerateTokensRequest(_message.Message):
    __slots__ = ("request_id", "epoch", "model", "prompt_token_ids", "sampling", "service_class")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SERVICE_CLASS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    model: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _common_pb2.Sampling
    service_class: str
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., model: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., service_class: _Optional[str] = ...) -> None: ...

class GenerateTokensResponse(_message.Message):
    __slots__ = ("token_ids", "drafted", "verified", "accepted", "finish_reason")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    drafted: int
    verified: int
    accepted: int
    finish_reason: _common_pb2.FinishReason
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., drafted: _Optional[int] = ..., verified: _Optional[int] = ..., accepted: _Optional[int] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ...) -> None: ...

class ExplainStepsRequest(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...

class ExplainStepsResponse(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedCompositeFieldContainer[StepExplanation]
    def __init__(self, steps: _Optional[_Iterable[_Union[StepExplanation, _Mapping]]] = ...) -> None: ...

class RequestExplanation(_message.Message):
    __slots__ = ("request_id", "survivals", "verified", "accepted", "committed")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SURVIVALS_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    survivals: _containers.RepeatedScalarFieldContainer[float]
    verified: int
    accepted: int
    committed: int
    def __init__(self, request_id: _Optional[str] = ..., survivals: _Optional[_Iterable[float]] = ..., verified: _Optional[int] = ..., accepted: _Optional[int] = ..., committed: _Optional[int] = ...) -> None: ...

class StepExplanation(_message.Message):
    __slots__ = ("step", "age_ms", "plan_epoch", "policy", "basis", "looked_up", "ceiling", "prompt_tokens", "decoding", "requests", "predicted_tokens", "predicted_ms", "committed", "round_ms", "step_ms", "draft_wait_ms")
    STEP_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    PLAN_EPOCH_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    BASIS_FIELD_NUMBER: _ClassVar[int]
    LOOKED_UP_FIELD_NUMBER: _ClassVar[int]
    CEILING_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_MS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    ROUND_MS_FIELD_NUMBER: _ClassVar[int]
    STEP_MS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    step: int
    age_ms: int
    plan_epoch: int
    policy: _scheduler_pb2.VerificationPolicy
    basis: StepBasis
    looked_up: bool
    ceiling: int
    prompt_tokens: int
    decoding: int
    requests: _containers.RepeatedCompositeFieldContainer[RequestExplanation]
    predicted_tokens: float
    predicted_ms: float
    committed: int
    round_ms: float
    step_ms: float
    draft_wait_ms: float
    def __init__(self, step: _Optional[int] = ..., age_ms: _Optional[int] = ..., plan_epoch: _Optional[int] = ..., policy: _Optional[_Union[_scheduler_pb2.VerificationPolicy, str]] = ..., basis: _Optional[_Union[StepBasis, str]] = ..., looked_up: bool = ..., ceiling: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., decoding: _Optional[int] = ..., requests: _Optional[_Iterable[_Union[RequestExplanation, _Mapping]]] = ..., predicted_tokens: _Optional[float] = ..., predicted_ms: _Optional[float] = ..., committed: _Optional[int] = ..., round_ms: _Optional[float] = ..., step_ms: _Optional[float] = ..., draft_wait_ms: _Optional[float] = ...) -> None: ...
