"""The verifier's way to a drafter: in this process, or a draft service over gRPC (dspark.rpc)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dspark.engine.drafting import DraftEngine
from dspark.types import BlockProposal, DraftWork, Fence, ResyncRequest


@dataclass(slots=True)
class DraftReplies:
    """What has come back from a drafter."""

    proposals: list[BlockProposal] = field(default_factory=list)
    resyncs: list[ResyncRequest] = field(default_factory=list)


class DraftLink(Protocol):
    """Sends work, gathers replies. A link that is down loses work; nothing else happens."""

    @property
    def available(self) -> bool:
        """Whether blocks can be asked for now."""

    def submit(self, works: Sequence[DraftWork]) -> None:
        """Hand over one round's work; returns without waiting for a remote drafter."""

    def free(self, sessions: Iterable[str]) -> None:
        """Forget sessions."""

    def collect(self, wanted: set[Fence]) -> DraftReplies:
        """Replies so far; waits for `wanted` no longer than about one verification step."""


class LocalDraftLink:
    """A drafter in the same process and thread: blocks are ready when submit returns."""

    def __init__(self, engine: DraftEngine) -> None:
        self._engine = engine
        self._replies = DraftReplies()

    @property
    def available(self) -> bool:
        """Always."""
        return True

    def submit(self, works: Sequence[DraftWork]) -> None:
        """Ingest and draft at once."""
        proposals, resyncs = self._engine.run(works)
        self._replies.proposals.extend(proposals)
        self._replies.resyncs.extend(resyncs)

    def free(self, sessions: Iterable[str]) -> None:
        """Forget sessions."""
        for session in sessions:
            self._engine.free(session)

    def collect(self, wanted: set[Fence]) -> DraftReplies:
        """All replies there are."""
        replies, self._replies = self._replies, DraftReplies()
        return replies
