"""Placement at work: reports and signs of life in, a verifier out."""

from __future__ import annotations

from dspark.config import SchedulerConfig
from dspark.errors import InvalidRequestError, OverloadedError
from dspark.pb import scheduler_pb2 as pb
from dspark.scheduling.cluster import Cluster, Member, Replica, Role
from dspark.scheduling.pace import bounded_wait_s
from dspark.scheduling.placement import Ask, Curve
from dspark.scheduling.prefixes import MOST_PREFIXES, Prefix, PrefixMemory
from dspark.scheduling.step_means import RunningMeans
from dspark.services.scheduler.step_times import StepTimes

_FRESH_BEATS = 2.0  # for so many heartbeats a queue that was full is held to be


class Placing:
    """One for each scheduler; lives on its event loop."""

    def __init__(self, config: SchedulerConfig, cluster: Cluster, step_times: StepTimes) -> None:
        self._fresh_s = _FRESH_BEATS * config.heartbeat_s
        self._cluster, self._step_times = cluster, step_times
        self._means: dict[str, RunningMeans] = {}
        self._prefixes = PrefixMemory()

    def heard(self, incarnation: str) -> None:
        """After a sign of life: forget who is gone, and see anew what this one gains."""
        alive = {m.replica.incarnation: m for m in self._cluster.members()}
        self._means = {name: means for name, means in self._means.items() if name in alive}
        member = alive.get(incarnation)
        if member is None or member.replica.role is not Role.VERIFIER:
            return
        table = self._step_times.known(member.replica.step_times_fingerprint)
        means = self._means.setdefault(incarnation, RunningMeans()).now
        if table is not None and means is not None and member.load.max_running:
            member.curve = Curve.of(table, means, member.load.max_running)

    def take(self, report: pb.StepReport) -> None:
        """Take in what a step did; of a verifier that has not registered, nothing."""
        means = self._means.get(report.incarnation)
        member = self._cluster.member(report.incarnation)
        if means is None or member is None:
            return
        requests, rows = report.decode_requests, report.tokens - report.prefill_tokens
        # Those whose blocks are under way hold pages, too.
        held = max(0, report.total_pages - report.free_pages) * member.load.page_tokens
        context = held // max(1, requests, member.load.running)
        table = self._step_times.known(member.replica.step_times_fingerprint)
        slow = None
        if table is not None and not report.prefill_tokens:
            step_ms = table.ms(requests, report.tokens, context)
            slow = (report.step_ms + report.draft_wait_ms) / step_ms
        means.add(requests, report.committed, rows, context, slow)

    def place(self, asked: pb.PlaceRequest) -> Replica:
        """A verifier for a request.

        Raises InvalidRequestError for prefixes that cannot be, OverloadedError when the queues of
        all that it fits are full, and what Cluster.place does.
        """
        prefixes = _prefixes(asked)
        positions = asked.prompt_tokens + asked.max_tokens
        hosts = [m for m in self._cluster.verifiers(asked.model) if m.replica.takes(positions)]
        full = [m for m in hosts if self._is_full(m)]
        if full and len(full) == len(hosts) and not asked.let_in:
            raise OverloadedError(
                f"the queues of all {len(full)} verifiers of {asked.model!r} are full: retry later",
                retry_after_s=bounded_wait_s(min(m.load.retry_after_s for m in full)),
            )
        ask = Ask(
            asked.prompt_tokens,
            asked.max_tokens,
            self._prefixes.cached_tokens(prefixes, {m.replica.incarnation for m in hosts}),
        )
        avoid = [*asked.avoid_incarnations, *(m.replica.incarnation for m in full)]
        chosen = self._cluster.place(asked.request_id, asked.model, avoid, ask)
        self._prefixes.give(prefixes, chosen.incarnation)
        return chosen

    def _is_full(self, member: Member) -> bool:
        load = member.load
        fresh = self._cluster.silent_s(member) <= self._fresh_s
        return fresh and 0 < load.max_waiting <= load.waiting


def _prefixes(asked: pb.PlaceRequest) -> list[Prefix]:
    if len(asked.prefixes) > MOST_PREFIXES:
        raise InvalidRequestError(
            f"a prompt has at most {MOST_PREFIXES} prefixes; got {len(asked.prefixes)}",
            param="prefixes",
        )
    prefixes = [Prefix(p.tokens, p.hash) for p in asked.prefixes]
    longest = max((p.tokens for p in prefixes), default=0)
    if longest > asked.prompt_tokens:
        raise InvalidRequestError(
            f"a prefix of {longest} tokens is longer than the prompt, {asked.prompt_tokens}",
            param="prefixes",
        )
    return prefixes
