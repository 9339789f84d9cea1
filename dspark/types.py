"""The few small values that every part of the system shares.

Positions count tokens of one request from 0, prompt included. With L tokens committed, the anchor
is token L-1: the last committed token, not yet run through the target. Features exist for positions
0..L-2, a block proposes positions L..L+γ-1, and verifying it runs the anchor and the admitted draft
tokens through the target at positions L-1, L, …

Shape symbols: γ block size, K proposal candidates a position, d drafter width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dspark.errors import InvalidRequestError

if TYPE_CHECKING:
    import torch

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

MAX_SEED = 2**63 - 1
_GREEDY_BELOW = 1e-5  # of temperature: logits divided by less leave the range of float32


class VerifyMode(StrEnum):
    """How drafted tokens are accepted (design §2)."""

    REJECTION = "rejection"
    COUPLED = "coupled"


class FinishReason(StrEnum):
    """Why a request produced its last token."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen; temperature 0 (or next to it) is greedy.

    Raises InvalidRequestError.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    max_tokens: int = 128
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    mode: VerifyMode = VerifyMode.REJECTION
    speculate: bool = True

    def __post_init__(self) -> None:
        def refuse(param: str, got: object, want: str) -> None:
            raise InvalidRequestError(f"{param} must be {want}; got {got!r}", param=param)

        if not 0.0 <= self.temperature <= 100.0:  # also refuses NaN
            refuse("temperature", self.temperature, "between 0 and 100")
        if self.top_k < 0:
            refuse("top_k", self.top_k, "0 (off) or a positive whole number")
        if not 0.0 < self.top_p <= 1.0:
            refuse("top_p", self.top_p, "above 0 and at most 1")
        if self.max_tokens < 1:
            refuse("max_tokens", self.max_tokens, "at least 1")
        if not 0 <= self.seed <= MAX_SEED:
            refuse("seed", self.seed, f"between 0 and {MAX_SEED}")

    @property
    def greedy(self) -> bool:
        """Whether the next token is the argmax, so that nothing is random."""
        return self.temperature < _GREEDY_BELOW

    @property
    def needs_law(self) -> bool:
        """Whether a draft token is judged by the law that it was drawn from."""
        return self.mode is VerifyMode.REJECTION and not self.greedy


@dataclass(frozen=True, slots=True)
class Request:
    """One generation. `epoch` grows each time the request is placed anew on a verifier."""

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    epoch: int = 0
    service_class: str = ""  # empty: the default


@dataclass(frozen=True, slots=True)
class Fence:
    """Says which state of which request a message between verifier and draft speaks of."""

    session: str
    epoch: int
    round: int
    committed_len: int  # L: tokens committed, the anchor included


@dataclass(frozen=True, slots=True)
class DraftWork:
    """Verifier to draft: newly committed tokens and, if block_size > 0, an anchor.

    The tokens are given by their features or, to a drafter that reads tokens, by their ids.
    """

    fence: Fence
    feature_start: int  # position of the first of them
    features: torch.Tensor  # [n, d]; [0, 0] beside token ids
    anchor_token_id: int
    block_size: int  # draft tokens wanted; 0 only takes the context in
    sampling: SamplingParams
    token_ids: torch.Tensor | None = None  # [n] int64

    @property
    def context(self) -> torch.Tensor:
        """[n, d] features, or [n] token ids."""
        return self.features if self.token_ids is None else self.token_ids


@dataclass(frozen=True, slots=True)
class BlockProposal:
    """A drafted block. Candidates are the whole proposal law of each position, sparse.

    They are None where no law is needed: greedy requests and `coupled` mode, in which a draft token
    is accepted exactly when it equals the target's own choice.
    """

    fence: Fence
    token_ids: IntArray  # [γ]
    confidences: FloatArray  # [γ] P(accepted | all before accepted), raw
    candidate_ids: IntArray | None = None  # [γ, K]
    candidate_probs: FloatArray | None = None  # [γ, K], rows sum to 1; 0 pads


@dataclass(frozen=True, slots=True)
class ResyncRequest:
    """Draft to verifier: this session's features have a gap; send them again from `have_len`."""

    session: str
    epoch: int
    have_len: int


@dataclass(frozen=True, slots=True)
class VerificationResult:
    """What one step did for one request. `token_ids[:accepted]` came from the drafter."""

    request_id: str
    token_ids: tuple[int, ...]
    drafted: int  # tokens proposed by the drafter, before trimming
    verified: int  # tokens that the plan admitted to the target's forward
    accepted: int
    finish_reason: FinishReason | None = None
    # Raw, of the verified draft tokens; of those emitted only, where the text ended among the
    # accepted ones, since what became of the rest is not told. `accepted` of these stood.
    confidences: tuple[float, ...] = ()
    greedy: bool = False  # whether the request is


class VerificationPolicy(StrEnum):
    """How many drafted tokens a step verifies."""

    ADAPTIVE = "adaptive"
    FIXED = "fixed"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the scheduler asks of a verifier until `valid_for_s` has passed."""

    epoch: int = 0
    policy: VerificationPolicy = VerificationPolicy.ADAPTIVE
    block_size: int = 0  # 0: the drafter's own γ
    max_draft_tokens: int = 0  # ceiling K on draft tokens in one step; 0: no ceiling
    valid_for_s: float = 10.0
    draft_by_request: bool = False  # adaptive: not for requests whose own blocks would not pay
    max_blocks: int = 0  # most requests to draft for in one round; 0: no bound


@dataclass(frozen=True, slots=True)
class Scale:
    """What raw confidences promise: σ(logit(c) / T + b), by position in the block."""

    temperatures: tuple[float, ...] = ()  # T; missing ones are 1
    biases: tuple[float, ...] = ()  # b; missing ones are 0


RAW_SCALE = Scale()  # changes nothing


@dataclass(frozen=True, slots=True)
class Scales:
    """A scale for each kind of request.

    A drafter knows how likely the target is to say something, but not whether it is asked for the
    likeliest alone: of tokens that it gives equal confidence, more stand with greedy requests.
    """

    sampled: Scale = RAW_SCALE
    greedy: Scale = RAW_SCALE


RAW_SCALES = Scales()


@dataclass(frozen=True, slots=True)
class BlockOutcomes:
    """What was promised of some verified blocks, and how many of their draft tokens stood."""

    confidences: FloatArray  # [N, γ] raw; NaN where not verified
    verified: IntArray  # [N]
    accepted: IntArray  # [N]
    greedy: BoolArray  # [N] whether their request was
    scales: Scales  # that the verifier uses


@dataclass(frozen=True, slots=True)
class ClassLoad:
    """How requests of one service class fare on a verifier."""

    name: str
    requests: int  # running
    floors: int  # of those, with a floor of tokens a second
    floors_missed: int  # of those, below it
    late_first_tokens: int  # behind their ceiling, since the start


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a verifier tells the scheduler after a step."""

    step: int
    step_ms: float
    draft_wait_ms: float
    decode_requests: int
    waiting_requests: int
    tokens: int  # target tokens in the forward, prefill included
    prefill_tokens: int
    drafted: int
    verified_by_position: tuple[int, ...]
    accepted_by_position: tuple[int, ...]
    committed: int
    free_pages: int
    total_pages: int
    calibration_epoch: int = 0  # of the table in use; 0: the checkpoint's, or none
    calibrations_refused: int = 0  # tables of another drafter that came, since the start
    outcomes: BlockOutcomes | None = None  # every so many steps
    classes: tuple[ClassLoad, ...] = ()  # where there are service classes
    predicted_tokens: float = 0.0  # that decoding requests should commit; 0: nothing was searched
    predicted_ms: float = 0.0  # that the round should take
    decoded_tokens: int = 0  # that decoding requests committed
    round_ms: float = 0.0  # since the end of the last forward; 0: the engine rested in between
