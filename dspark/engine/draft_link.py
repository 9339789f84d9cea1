"""The verifier's way to a drafter: in this process, or a draft service over gRPC (dspark.rpc)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from dspark.engine.drafting import BegunDrafts, DraftEngine
from dspark.kernels.transfer import to_host
from dspark.types import BlockProposal, DraftWork, Fence, ResyncRequest

# Context that a drafter lacks is sent a piece a round, so that nobody's block waits for long behind
# another's prompt. To a GPU in the same process, rows are next to nothing.
CATCH_UP_ROWS = 1024
_CATCH_UP_ROWS_ON_GPU = 8192


@dataclass(slots=True)
class DraftReplies:
    """What has come back from a drafter."""

    proposals: list[BlockProposal] = field(default_factory=list)
    resyncs: list[ResyncRequest] = field(default_factory=list)
    pending: frozenset[Fence] = frozenset()  # blocks that are still under way


class DraftLink(Protocol):
    """Sends work, gathers replies. A link that is down loses work; nothing else happens."""

    @property
    def available(self) -> bool:
        """Whether blocks can be asked for now."""

    @property
    def latency_s(self) -> float:
        """Usual time from submitting work to its blocks; 0 where collect waits for them."""

    @property
    def deadline_s(self) -> float:
        """How long after submitting work its blocks are waited for."""

    @property
    def catch_up_rows(self) -> int:
        """Rows of context that a round may send beside what the round itself has brought."""

    def submit(self, works: Sequence[DraftWork]) -> None:
        """Hand over one round's work; returns without waiting for a remote drafter."""

    def free(self, sessions: Iterable[str]) -> None:
        """Forget sessions."""

    def collect(self, wait_s: float) -> DraftReplies:
        """Replies so far; if there are none, waits for the next."""

    def missed(self, sessions: Iterable[str]) -> None:
        """Blocks of these did not come by their deadline and are no longer waited for."""


class LocalDraftLink:
    """A drafter in the same process and thread: a GPU is at it until blocks are collected."""

    latency_s = 0.0
    deadline_s = 0.0

    def __init__(self, engine: DraftEngine) -> None:
        self._engine = engine
        on_gpu = engine.drafter.device.type == "cuda"
        self.catch_up_rows = _CATCH_UP_ROWS_ON_GPU if on_gpu else CATCH_UP_ROWS
        self._begun: list[BegunDrafts] = []

    @property
    def available(self) -> bool:
        """Always."""
        return True

    def submit(self, works: Sequence[DraftWork]) -> None:
        """Ingest at once, and have blocks drafted."""
        self._begun.append(self._engine.begin(works))

    def free(self, sessions: Iterable[str]) -> None:
        """Forget sessions."""
        for session in sessions:
            self._engine.free(session)

    def collect(self, wait_s: float) -> DraftReplies:
        """All that was submitted, waited for, however long it takes."""
        begun, self._begun = self._begun, []
        return DraftReplies(
            [proposal for one in begun for proposal in one.proposals()],
            [resync for one in begun for resync in one.resyncs],
        )

    def missed(self, sessions: Iterable[str]) -> None:
        """Cannot happen here."""


def on_host(works: Sequence[DraftWork]) -> list[DraftWork]:
    """The works with their features in the host's memory, from a GPU in one copy, as bfloat16."""
    (rows,) = to_host([torch.cat([w.features for w in works]).to(torch.bfloat16)])
    parts = rows.split([len(work.features) for work in works])
    return [replace(w, features=part) for w, part in zip(works, parts, strict=True)]
