"""What the scheduler knows of the cluster, and where requests go. No I/O; the clock is given.

A replica is known by its incarnation, one for each start of its process, and forgotten when its
lease runs out. Requests go where they gain most (dspark.scheduling.placement); those placed since
a verifier's last sign of life count too, so that a burst between two heartbeats spreads. Verifiers
and the draft replicas of their drafter are paired evenly (dspark.scheduling.pairing); pairs stay
while that lasts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from dspark.errors import ModelNotFoundError, UnavailableError
from dspark.scheduling.draft_quota import is_saturated
from dspark.scheduling.pairing import Pair, pair
from dspark.scheduling.placement import Ask, Candidate, Curve, choose


class Role(StrEnum):
    """What a replica does."""

    VERIFIER = "verifier"
    DRAFT = "draft"
    GATEWAY = "gateway"


@dataclass(frozen=True, slots=True)
class Replica:
    """A process that serves."""

    role: Role
    incarnation: str
    address: str
    model: str = ""
    drafter_fingerprint: str = ""
    max_context_tokens: int = 0  # 0: not told
    step_times_fingerprint: str = ""

    def takes(self, positions: int) -> bool:
        """Whether a request of so many may be sent there, for all that is known."""
        return not self.max_context_tokens or positions <= self.max_context_tokens


@dataclass(frozen=True, slots=True)
class Load:
    """How busy it is."""

    running: int = 0
    waiting: int = 0
    free_pages: int = 0
    total_pages: int = 0
    # Of a draft replica, since its last heartbeat:
    busy_share: float = 0.0  # of the time, spent on work
    queued_works: int = 0  # the most that waited behind a run
    works_per_s: float = 0.0  # of the time spent on them; 0: not known
    # Of a verifier; 0: not told.
    page_tokens: int = 0
    max_running: int = 0
    max_waiting: int = 0
    retry_after_s: float = 0.0


@dataclass(slots=True)
class Member:
    """A replica, its last load, and what happened since."""

    replica: Replica
    load: Load
    seen_at: float
    draining: bool = False
    saturated: bool = False  # a draft replica that is asked for more than it can do
    # Since the last heartbeat: prompt tokens by request id.
    placed: dict[str, int] = field(default_factory=dict)
    curve: Curve | None = None  # of a verifier: what requests gain there, if that is known

    @property
    def busy(self) -> int:
        """Requests that it has or is about to get."""
        return self.load.running + self.load.waiting + len(self.placed)

    @property
    def candidate(self) -> Candidate:
        """As placement sees it."""
        load, page = self.load, max(1, self.load.page_tokens)
        return Candidate(
            name=self.replica.incarnation,
            requests=self.busy,
            queued=load.waiting + len(self.placed),
            most_requests=load.max_running,
            free_pages=load.free_pages - sum(-(-tokens // page) for tokens in self.placed.values()),
            page_tokens=load.page_tokens,
            curve=self.curve,
        )


@dataclass(frozen=True, slots=True)
class DraftShare:
    """A draft replica, and the part of its work that is meant for one verifier."""

    member: Member
    share: float  # 0..1


class Cluster:
    """Members with a lease."""

    def __init__(self, lease_s: float, clock: Callable[[], float]) -> None:
        self._lease_s, self._clock = lease_s, clock
        self._members: dict[str, Member] = {}
        self._pairs: dict[str, frozenset[Pair]] = {}  # of incarnations, by drafter fingerprint
        self._models: set[str] = set()  # every model that was ever hosted

    def beat(self, replica: Replica, load: Load, draining: bool = False) -> None:
        """A sign of life: registers, renews, and takes the load's word for what was placed."""
        before = self._members.get(replica.incarnation)
        if before is None and replica.role is not Role.GATEWAY:
            # A new process at an address means that the old one is gone. Nobody calls a gateway by
            # its address, which is where it listens: 0.0.0.0, say, on each of several nodes.
            for old in [
                name
                for name, member in self._members.items()
                if member.replica.address == replica.address
            ]:
                del self._members[old]
        if replica.role is Role.VERIFIER:
            self._models.add(replica.model)
        saturated = is_saturated(
            load.busy_share, load.queued_works, before is not None and before.saturated
        )
        self._members[replica.incarnation] = Member(
            replica, load, self._clock(), draining, saturated
        )

    def members(self) -> list[Member]:
        """All with a lease."""
        now = self._clock()
        gone = [n for n, m in self._members.items() if now - m.seen_at > self._lease_s]
        for name in gone:
            del self._members[name]
        return list(self._members.values())

    def member(self, incarnation: str) -> Member | None:
        """One that had a lease when it was last looked."""
        return self._members.get(incarnation)

    def replica(self, incarnation: str) -> Replica | None:
        """Who that is."""
        member = self.member(incarnation)
        return None if member is None else member.replica

    def silent_s(self, member: Member) -> float:
        """Since a member's last sign of life."""
        return self._clock() - member.seen_at

    def verifiers(self, model: str | None = None) -> list[Member]:
        """Verifiers that take new requests, of one model or of any."""
        return [
            m
            for m in self.members()
            if m.replica.role is Role.VERIFIER
            and not m.draining
            and (model is None or m.replica.model == model)
        ]

    def place(
        self, request_id: str, model: str, avoid: Iterable[str] = (), ask: Ask | None = None
    ) -> Replica:
        """The verifier for a request; the same again for a repeated call.

        Raises ModelNotFoundError when nobody ever hosted the model, UnavailableError when nobody
        that the request fits does now. A verifier that is full says so itself, and the caller tries
        the next.
        """
        candidates = self.verifiers(model)
        if not candidates:
            if model in self._models:
                raise UnavailableError(f"no verifier of {model!r} is up at the moment; retry")
            hosted = ", ".join(sorted(self._models)) or "none yet"
            raise ModelNotFoundError(f"no verifier hosts {model!r}; hosted here: {hosted}")
        ask, shunned = ask or Ask(), set(avoid)
        fitting = [m for m in candidates if m.replica.takes(ask.positions)]
        if not fitting:
            largest = max(m.replica.max_context_tokens for m in candidates)
            raise UnavailableError(
                f"a request of {ask.positions} positions fits no verifier of {model!r} that is up "
                f"at the moment; the largest takes {largest}: retry"
            )
        wanted = [m for m in fitting if m.replica.incarnation not in shunned] or fitting
        for member in wanted:
            if request_id in member.placed:
                return member.replica
        name = choose([m.candidate for m in wanted], ask).name
        self._members[name].placed[request_id] = ask.prompt_tokens
        return self._members[name].replica

    def drafts_for(self, verifier: str) -> list[DraftShare]:
        """The draft replicas that a verifier shall connect to; none if none fits."""
        members = {m.replica.incarnation: m for m in self.members()}
        own = members.get(verifier)
        if own is None or not own.replica.drafter_fingerprint:
            return []
        weights = own.replica.drafter_fingerprint
        fitting = [m for m in members.values() if m.replica.drafter_fingerprint == weights]
        pairs = self._pairs[weights] = pair(
            {m.replica.incarnation for m in fitting if m.replica.role is Role.VERIFIER},
            {
                m.replica.incarnation
                for m in fitting
                if m.replica.role is Role.DRAFT and not m.draining
            },
            self._pairs.get(weights, ()),
        )
        served = Counter(draft for _, draft in pairs)
        return [
            DraftShare(members[draft], 1.0 / served[draft])
            for one, draft in sorted(pairs)
            if one == verifier
        ]
