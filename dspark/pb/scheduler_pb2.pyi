from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_VERIFIER: _ClassVar[Role]
    ROLE_DRAFT: _ClassVar[Role]
    ROLE_GATEWAY: _ClassVar[Role]

class VerificationPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERIFICATION_POLICY_UNSPECIFIED: _ClassVar[VerificationPolicy]
    VERIFICATION_POLICY_ADAPTIVE: _ClassVar[VerificationPolicy]
    VERIFICATION_POLICY_FIXED: _ClassVar[VerificationPolicy]
    VERIFICATION_POLICY_OFF: _ClassVar[VerificationPolicy]
ROLE_UNSPECIFIED: Role
ROLE_VERIFIER: Role
ROLE_DRAFT: Role
ROLE_GATEWAY: Role
VERIFICATION_POLICY_UNSPECIFIED: VerificationPolicy
VERIFICATION_POLICY_ADAPTIVE: VerificationPolicy
VERIFICATION_POLICY_FIXED: VerificationPolicy
VERIFICATION_POLICY_OFF: VerificationPolicy

class Replica(_message.Message):
    __slots__ = ("role", "incarnation", "address", "model", "drafter_fingerprint", "max_context_tokens", "step_times_fingerprint")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_TIMES_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    role: Role
    incarnation: str
    address: str
    model: str
    drafter_fingerprint: str
    max_context_tokens: int
    step_times_fingerprint: str
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., incarnation: _Optional[str] = ..., address: _Optional[str] = ..., model: _Optional[str] = ..., drafter_fingerprint: _Optional[str] = ..., max_context_tokens: _Optional[int] = ..., step_times_fingerprint: _Optional[str] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("running", "waiting", "free_pages", "total_pages", "busy_share", "queued_works", "works_per_s", "page_tokens", "max_running", "max_waiting", "retry_after_ms")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    FREE_PAGES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_PAGES_FIELD_NUMBER: _ClassVar[int]
    BUSY_SHARE_FIELD_NUMBER: _ClassVar[int]
    QUEUED_WORKS_FIELD_NUMBER: _ClassVar[int]
    WORKS_PER_S_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    free_pages: int
    total_pages: int
    busy_share: float
    queued_works: int
    works_per_s: float
    page_tokens: int
    max_running: int
    max_waiting: int
    retry_after_ms: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., free_pages: _Optional[int] = ..., total_pages: _Optional[int] = ..., busy_share: _Optional[float] = ..., queued_works: _Optional[int] = ..., works_per_s: _Optional[float] = ..., page_tokens: _Optional[int] = ..., max_running: _Optional[int] = ..., max_waiting: _Optional[int] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("replica", "load", "draining")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    load: Load
    draining: bool
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., draining: bool = ...) -> None: ...

class DraftShare(_message.Message):
    __slots__ = ("draft", "share")
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    draft: Replica
    share: float
    def __init__(self, draft: _Optional[_Union[Replica, _Mapping]] = ..., share: _Optional[float] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("lease_ms", "verifiers", "drafts")
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    VERIFIERS_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    lease_ms: int
    verifiers: _containers.RepeatedCompositeFieldContainer[Replica]
    drafts: _containers.RepeatedCompositeFieldContainer[DraftShare]
    def __init__(self, lease_ms: _Optional[int] = ..., verifiers: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ..., drafts: _Optional[_Iterable[_Union[DraftShare, _Mapping]]] = ...) -> None: ...

class PlaceRequest(_message.Message):
    __slots__ = ("request_id", "model", "prompt_tokens", "max_tokens", "avoid_incarnations", "prefixes", "let_in")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AVOID_INCARNATIONS_FIELD_NUMBER: _ClassVar[int]
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    LET_IN_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    prompt_tokens: int
    max_tokens: int
    avoid_incarnations: _containers.RepeatedScalarFieldContainer[str]
    prefixes: _containers.RepeatedCompositeFieldContainer[Prefix]
    let_in: bool
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., avoid_incarnations: _Optional[_Iterable[str]] = ..., prefixes: _Optional[_Iterable[_Union[Prefix, _Mapping]]] = ..., let_in: bool = ...) -> None: ...

class Prefix(_message.Message):
    __slots__ = ("tokens", "hash")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    hash: int
    def __init__(self, tokens: _Optional[int] = ..., hash: _Optional[int] = ...) -> None: ...

class PlaceResponse(_message.Message):
    __slots__ = ("verifier",)
    VERIFIER_FIELD_NUMBER: _ClassVar[int]
    verifier: Replica
    def __init__(self, verifier: _Optional[_Union[Replica, _Mapping]] = ...) -> None: ...

class StepReport(_message.Message):
    __slots__ = ("incarnation", "step", "step_ms", "draft_wait_ms", "decode_requests", "waiting_requests", "tokens", "prefill_tokens", "drafted", "verified_by_position", "accepted_by_position", "committed", "free_pages", "total_pages", "calibration_epoch", "calibrations_refused", "outcomes", "classes", "plans_refused", "predicted_tokens", "predicted_ms", "decoded_tokens", "round_ms")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEP_MS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_BY_POSITION_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_BY_POSITION_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    FREE_PAGES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_PAGES_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_EPOCH_FIELD_NUMBER: _ClassVar[int]
    CALIBRATIONS_REFUSED_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    PLANS_REFUSED_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_MS_FIELD_NUMBER: _ClassVar[int]
    DECODED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROUND_MS_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    step: int
    step_ms: float
    draft_wait_ms: float
    decode_requests: int
    waiting_requests: int
    tokens: int
    prefill_tokens: int
    drafted: int
    verified_by_position: _containers.RepeatedScalarFieldContainer[int]
    accepted_by_position: _containers.RepeatedScalarFieldContainer[int]
    committed: int
    free_pages: int
    total_pages: int
    calibration_epoch: int
    calibrations_refused: int
    outcomes: BlockOutcomes
    classes: _containers.RepeatedCompositeFieldContainer[ClassLoad]
    plans_refused: int
    predicted_tokens: float
    predicted_ms: float
    decoded_tokens: int
    round_ms: float
    def __init__(self, incarnation: _Optional[str] = ..., step: _Optional[int] = ..., step_ms: _Optional[float] = ..., draft_wait_ms: _Optional[float] = ..., decode_requests: _Optional[int] = ..., waiting_requests: _Optional[int] = ..., tokens: _Optional[int] = ..., prefill_tokens: _Optional[int] = ..., drafted: _Optional[int] = ..., verified_by_position: _Optional[_Iterable[int]] = ..., accepted_by_position: _Optional[_Iterable[int]] = ..., committed: _Optional[int] = ..., free_pages: _Optional[int] = ..., total_pages: _Optional[int] = ..., calibration_epoch: _Optional[int] = ..., calibrations_refused: _Optional[int] = ..., outcomes: _Optional[_Union[BlockOutcomes, _Mapping]] = ..., classes: _Optional[_Iterable[_Union[ClassLoad, _Mapping]]] = ..., plans_refused: _Optional[int] = ..., predicted_tokens: _Optional[float] = ..., predicted_ms: _Optional[float] = ..., decoded_tokens: _Optional[int] = ..., round_ms: _Optional[float] = ...) -> None: ...

class ClassLoad(_message.Message):
    __slots__ = ("name", "requests", "floors", "floors_missed", "late_first_tokens")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FLOORS_FIELD_NUMBER: _ClassVar[int]
    FLOORS_MISSED_FIELD_NUMBER: _ClassVar[int]
    LATE_FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    name: str
    requests: int
    floors: int
    floors_missed: int
    late_first_tokens: int
    def __init__(self, name: _Optional[str] = ..., requests: _Optional[int] = ..., floors: _Optional[int] = ..., floors_missed: _Optional[int] = ..., late_first_tokens: _Optional[int] = ...) -> None: ...

class BlockOutcomes(_message.Message):
    __slots__ = ("block_size", "verified", "accepted", "confidences", "greedy", "sampled_scale", "greedy_scale")
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCES_FIELD_NUMBER: _ClassVar[int]
    GREEDY_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_SCALE_FIELD_NUMBER: _ClassVar[int]
    GREEDY_SCALE_FIELD_NUMBER: _ClassVar[int]
    block_size: int
    verified: bytes
    accepted: bytes
    confidences: bytes
    greedy: bytes
    sampled_scale: Scale
    greedy_scale: Scale
    def __init__(self, block_size: _Optional[int] = ..., verified: _Optional[bytes] = ..., accepted: _Optional[bytes] = ..., confidences: _Optional[bytes] = ..., greedy: _Optional[bytes] = ..., sampled_scale: _Optional[_Union[Scale, _Mapping]] = ..., greedy_scale: _Optional[_Union[Scale, _Mapping]] = ...) -> None: ...

class Scale(_message.Message):
    __slots__ = ("temperatures", "biases")
    TEMPERATURES_FIELD_NUMBER: _ClassVar[int]
    BIASES_FIELD_NUMBER: _ClassVar[int]
    temperatures: _containers.RepeatedScalarFieldContainer[float]
    biases: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, temperatures: _Optional[_Iterable[float]] = ..., biases: _Optional[_Iterable[float]] = ...) -> None: ...

class CalibrationTable(_message.Message):
    __slots__ = ("sampled_scale", "greedy_scale", "block_size", "drafter_fingerprint", "blocks", "epoch")
    SAMPLED_SCALE_FIELD_NUMBER: _ClassVar[int]
    GREEDY_SCALE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    sampled_scale: Scale
    greedy_scale: Scale
    block_size: int
    drafter_fingerprint: str
    blocks: int
    epoch: int
    def __init__(self, sampled_scale: _Optional[_Union[Scale, _Mapping]] = ..., greedy_scale: _Optional[_Union[Scale, _Mapping]] = ..., block_size: _Optional[int] = ..., drafter_fingerprint: _Optional[str] = ..., blocks: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("epoch", "policy", "block_size", "max_draft_tokens", "valid_for_ms", "calibration", "draft_by_request", "max_blocks")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VALID_FOR_MS_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    DRAFT_BY_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    policy: VerificationPolicy
    block_size: int
    max_draft_tokens: int
    valid_for_ms: int
    calibration: CalibrationTable
    draft_by_request: bool
    max_blocks: int
    def __init__(self, epoch: _Optional[int] = ..., policy: _Optional[_Union[VerificationPolicy, str]] = ..., block_size: _Optional[int] = ..., max_draft_tokens: _Optional[int] = ..., valid_for_ms: _Optional[int] = ..., calibration: _Optional[_Union[CalibrationTable, _Mapping]] = ..., draft_by_request: bool = ..., max_blocks: _Optional[int] = ...) -> None: ...

class DescribeClusterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReplicaStatus(_message.Message):
    __slots__ = ("replica", "load", "draining", "silent_ms")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    SILENT_MS_FIELD_NUMBER: _ClassVar[int]
    replica: Replica
    load: Load
    draining: bool
    silent_ms: int
    def __init__(self, replica: _Optional[_Union[Replica, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., draining: bool = ..., silent_ms: _Optional[int] = ...) -> None: ...

class CalibrationStatus(_message.Message):
    __slots__ = ("model", "drafter_fingerprint", "table", "window_blocks", "raw_error", "error", "misfits")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RAW_ERROR_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MISFITS_FIELD_NUMBER: _ClassVar[int]
    model: str
    drafter_fingerprint: str
    table: CalibrationTable
    window_blocks: int
    raw_error: float
    error: float
    misfits: int
    def __init__(self, model: _Optional[str] = ..., drafter_fingerprint: _Optional[str] = ..., table: _Optional[_Union[CalibrationTable, _Mapping]] = ..., window_blocks: _Optional[int] = ..., raw_error: _Optional[float] = ..., error: _Optional[float] = ..., misfits: _Optional[int] = ...) -> None: ...

class DescribeClusterResponse(_message.Message):
    __slots__ = ("replicas", "reports", "calibrations", "kubernetes", "throughputs")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    CALIBRATIONS_FIELD_NUMBER: _ClassVar[int]
    KUBERNETES_FIELD_NUMBER: _ClassVar[int]
    THROUGHPUTS_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaStatus]
    reports: _containers.RepeatedCompositeFieldContainer[StepReport]
    calibrations: _containers.RepeatedCompositeFieldContainer[CalibrationStatus]
    kubernetes: ClusterLoad
    throughputs: _containers.RepeatedCompositeFieldContainer[ThroughputStatus]
    def __init__(self, replicas: _Optional[_Iterable[_Union[ReplicaStatus, _Mapping]]] = ..., reports: _Optional[_Iterable[_Union[StepReport, _Mapping]]] = ..., calibrations: _Optional[_Iterable[_Union[CalibrationStatus, _Mapping]]] = ..., kubernetes: _Optional[_Union[ClusterLoad, _Mapping]] = ..., throughputs: _Optional[_Iterable[_Union[ThroughputStatus, _Mapping]]] = ...) -> None: ...

class ThroughputStatus(_message.Message):
    __slots__ = ("incarnation", "steps", "predicted_tokens_per_s", "measured_tokens_per_s", "token_ratio", "time_ratio", "alarm")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    MEASURED_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    TOKEN_RATIO_FIELD_NUMBER: _ClassVar[int]
    TIME_RATIO_FIELD_NUMBER: _ClassVar[int]
    ALARM_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    steps: int
    predicted_tokens_per_s: float
    measured_tokens_per_s: float
    token_ratio: float
    time_ratio: float
    alarm: bool
    def __init__(self, incarnation: _Optional[str] = ..., steps: _Optional[int] = ..., predicted_tokens_per_s: _Optional[float] = ..., measured_tokens_per_s: _Optional[float] = ..., token_ratio: _Optional[float] = ..., time_ratio: _Optional[float] = ..., alarm: bool = ...) -> None: ...

class AcceleratorLoad(_message.Message):
    __slots__ = ("resource", "allocatable", "requested", "free", "waiting")
    RESOURCE_FIELD_NUMBER: _ClassVar[int]
    ALLOCATABLE_FIELD_NUMBER: _ClassVar[int]
    REQUESTED_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    resource: str
    allocatable: int
    requested: int
    free: int
    waiting: int
    def __init__(self, resource: _Optional[str] = ..., allocatable: _Optional[int] = ..., requested: _Optional[int] = ..., free: _Optional[int] = ..., waiting: _Optional[int] = ...) -> None: ...

class PoolLoad(_message.Message):
    __slots__ = ("name", "nodes_ready", "nodes_not_ready", "nodes_cordoned", "products", "accelerators")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODES_READY_FIELD_NUMBER: _ClassVar[int]
    NODES_NOT_READY_FIELD_NUMBER: _ClassVar[int]
    NODES_CORDONED_FIELD_NUMBER: _ClassVar[int]
    PRODUCTS_FIELD_NUMBER: _ClassVar[int]
    ACCELERATORS_FIELD_NUMBER: _ClassVar[int]
    name: str
    nodes_ready: int
    nodes_not_ready: int
    nodes_cordoned: int
    products: _containers.RepeatedScalarFieldContainer[str]
    accelerators: _containers.RepeatedCompositeFieldContainer[AcceleratorLoad]
    def __init__(self, name: _Optional[str] = ..., nodes_ready: _Optional[int] = ..., nodes_not_ready: _Optional[int] = ..., nodes_cordoned: _Optional[int] = ..., products: _Optional[_Iterable[str]] = ..., accelerators: _Optional[_Iterable[_Union[AcceleratorLoad, _Mapping]]] = ...) -> None: ...

class PendingPod(_message.Message):
    __slots__ = ("namespace", "name", "role", "pool", "placed", "reason", "message", "since_unix_ms")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    PLACED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    SINCE_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    name: str
    role: str
    pool: str
    placed: bool
    reason: str
    message: str
    since_unix_ms: int
    def __init__(self, namespace: _Optional[str] = ..., name: _Optional[str] = ..., role: _Optional[str] = ..., pool: _Optional[str] = ..., placed: bool = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., since_unix_ms: _Optional[int] = ...) -> None: ...

class ClusterLoad(_message.Message):
    __slots__ = ("pools", "pending", "pending_pods", "refused_quantities", "nodes_age_ms", "pods_age_ms")
    POOLS_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    PENDING_PODS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_QUANTITIES_FIELD_NUMBER: _ClassVar[int]
    NODES_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    PODS_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    pools: _containers.RepeatedCompositeFieldContainer[PoolLoad]
    pending: _containers.RepeatedCompositeFieldContainer[PendingPod]
    pending_pods: int
    refused_quantities: int
    nodes_age_ms: int
    pods_age_ms: int
    def __init__(self, pools: _Optional[_Iterable[_Union[PoolLoad, _Mapping]]] = ..., pending: _Optional[_Iterable[_Union[PendingPod, _Mapping]]] = ..., pending_pods: _Optional[int] = ..., refused_quantities: _Optional[int] = ..., nodes_age_ms: _Optional[int] = ..., pods_age_ms: _Optional[int] = ...) -> None: ...

class StepTimeTable(_message.Message):
    __slots__ = ("fingerprint", "requests", "rows", "contexts", "step_ms", "padded")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    STEP_MS_FIELD_NUMBER: _ClassVar[int]
    PADDED_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    requests: _containers.RepeatedScalarFieldContainer[int]
    rows: _containers.RepeatedScalarFieldContainer[int]
    contexts: _containers.RepeatedScalarFieldContainer[int]
    step_ms: _containers.RepeatedScalarFieldContainer[float]
    padded: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, fingerprint: _Optional[str] = ..., requests: _Optional[_Iterable[int]] = ..., rows: _Optional[_Iterable[int]] = ..., contexts: _Optional[_Iterable[int]] = ..., step_ms: _Optional[_Iterable[float]] = ..., padded: _Optional[_Iterable[int]] = ...) -> None: ...

class GetStepTimesRequest(_message.Message):
    __slots__ = ("fingerprint",)
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    def __init__(self, fingerprint: _Optional[str] = ...) -> None: ...

class GetStepTimesResponse(_message.Message):
    __slots__ = ("table",)
    TABLE_FIELD_NUMBER: _ClassVar[int]
    table: StepTimeTable
    def __init__(self, table: _Optional[_Union[StepTimeTable, _Mapping]] = ...) -> None: ...

class PutStepTimesRequest(_message.Message):
    __slots__ = ("table",)
    TABLE_FIELD_NUMBER: _ClassVar[int]
    table: StepTimeTable
    def __init__(self, table: _Optional[_Union[StepTimeTable, _Mapping]] = ...) -> None: ...

class PutStepTimesResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
