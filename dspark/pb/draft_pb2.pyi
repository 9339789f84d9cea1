from dspark.pb import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Fence(_message.Message):
    __slots__ = ("session", "epoch", "round", "committed_len")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_LEN_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    round: int
    committed_len: int
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., round: _Optional[int] = ..., committed_len: _Optional[int] = ...) -> None: ...

class ConnectRequest(_message.Message):
    __slots__ = ("hello", "work", "free")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    work: WorkBatch
    free: FreeSessions
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., work: _Optional[_Union[WorkBatch, _Mapping]] = ..., free: _Optional[_Union[FreeSessions, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "verifier", "drafter_fingerprint")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    VERIFIER_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    verifier: str
    drafter_fingerprint: str
    def __init__(self, protocol_version: _Optional[int] = ..., verifier: _Optional[str] = ..., drafter_fingerprint: _Optional[str] = ...) -> None: ...

class WorkBatch(_message.Message):
    __slots__ = ("sequence", "works")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    WORKS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    works: _containers.RepeatedCompositeFieldContainer[DraftWork]
    def __init__(self, sequence: _Optional[int] = ..., works: _Optional[_Iterable[_Union[DraftWork, _Mapping]]] = ...) -> None: ...

class DraftWork(_message.Message):
    __slots__ = ("fence", "feature_start", "features", "anchor_token_id", "block_size", "sampling", "token_ids")
    FENCE_FIELD_NUMBER: _ClassVar[int]
    FEATURE_START_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    fence: Fence
    feature_start: int
    features: bytes
    anchor_token_id: int
    block_size: int
    sampling: _common_pb2.Sampling
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, fence: _Optional[_Union[Fence, _Mapping]] = ..., feature_start: _Optional[int] = ..., features: _Optional[bytes] = ..., anchor_token_id: _Optional[int] = ..., block_size: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class FreeSessions(_message.Message):
    __slots__ = ("sessions",)
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sessions: _Optional[_Iterable[str]] = ...) -> None: ...

class ConnectResponse(_message.Message):
    __slots__ = ("welcome", "reply")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    reply: ReplyBatch
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., reply: _Optional[_Union[ReplyBatch, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("draft", "block_size", "credits")
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    draft: str
    block_size: int
    credits: int
    def __init__(self, draft: _Optional[str] = ..., block_size: _Optional[int] = ..., credits: _Optional[int] = ...) -> None: ...

class ReplyBatch(_message.Message):
    __slots__ = ("sequence", "proposals", "resyncs")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PROPOSALS_FIELD_NUMBER: _ClassVar[int]
    RESYNCS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    proposals: _containers.RepeatedCompositeFieldContainer[BlockProposal]
    resyncs: _containers.RepeatedCompositeFieldContainer[ResyncRequest]
    def __init__(self, sequence: _Optional[int] = ..., proposals: _Optional[_Iterable[_Union[BlockProposal, _Mapping]]] = ..., resyncs: _Optional[_Iterable[_Union[ResyncRequest, _Mapping]]] = ...) -> None: ...

class BlockProposal(_message.Message):
    __slots__ = ("fence", "token_ids", "confidences", "candidates", "candidate_ids", "candidate_probs")
    FENCE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCES_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_IDS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_PROBS_FIELD_NUMBER: _ClassVar[int]
    fence: Fence
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    confidences: _containers.RepeatedScalarFieldContainer[float]
    candidates: int
    candidate_ids: bytes
    candidate_probs: bytes
    def __init__(self, fence: _Optional[_Union[Fence, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., confidences: _Optional[_Iterable[float]] = ..., candidates: _Optional[int] = ..., candidate_ids: _Optional[bytes] = ..., candidate_probs: _Optional[bytes] = ...) -> None: ...

class ResyncRequest(_message.Message):
    __slots__ = ("session", "epoch", "have_len")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HAVE_LEN_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    have_len: int
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., have_len: _Optional[int] = ...) -> None: ...
