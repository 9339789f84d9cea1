"""What is around a release's pods: claims, disruption budgets, network policies, events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta

from dspark.cli.kube_doctor.findings import Finding, failed, listed, ok, unseen, warning
from dspark.cli.kube_doctor.objects import (
    Denied,
    Listing,
    Raw,
    dig,
    labels_of,
    mapping,
    name_of,
    printable,
    selects,
    text,
    time_of,
)

_LATELY = timedelta(hours=1)
_MOST_EVENTS = 8


def check_release_claims(claims: Listing) -> Iterator[Finding]:
    """Bound, or why not."""
    if isinstance(claims, Denied):
        yield unseen("claims", claims)
        return
    for claim in claims:
        check, phase = f"claim {name_of(claim)}", text(claim, "status", "phase")
        if phase == "Bound":
            yield ok(check, "bound")
        elif phase == "Lost":
            yield failed(check, "its volume is lost", "restore the volume, or delete the claim")
        else:
            named = text(claim, "spec", "storageClassName") or "the default"
            yield failed(
                check,
                f"{phase or 'no phase'}: no volume of storage class {named} yet",
                f"kubectl describe pvc {name_of(claim)}; a class that binds at first use waits "
                "for a pod",
            )


def check_budgets(budgets: Listing) -> Iterator[Finding]:
    """Whether they let any pod go."""
    if isinstance(budgets, Denied):
        yield unseen("disruption budgets", budgets)
        return
    for budget in budgets:
        check = f"disruption budget {name_of(budget)}"
        expected = int(dig(budget, "status", "expectedPods") or 0)
        allowed = int(dig(budget, "status", "disruptionsAllowed") or 0)
        healthy = int(dig(budget, "status", "currentHealthy") or 0)
        if expected and not allowed:
            yield warning(
                check,
                f"lets no pod go: {healthy} of {expected} healthy",
                "a drain of their nodes waits until there are more; raise the pool's replicas "
                "before maintenance",
            )
        else:
            yield ok(check, f"{allowed} of {expected} pods may go")


def check_policies(policies: Listing, pods: Listing) -> Iterator[Finding]:
    """Whether some policy selects each pod: one that none selects is open to all."""
    check = "network policies"
    if isinstance(policies, Denied) or isinstance(pods, Denied):
        denied = policies if isinstance(policies, Denied) else pods
        assert isinstance(denied, Denied)
        yield unseen(check, denied)
        return
    open_to_all = [
        name_of(pod)
        for pod in pods
        if not any(selects(mapping(p, "spec", "podSelector"), labels_of(pod)) for p in policies)
    ]
    if open_to_all:
        yield warning(
            check,
            f"none selects {listed(open_to_all)}: all pods of the cluster may talk to these",
            "switch the chart's network policies on",
        )
    elif pods:
        yield ok(check, "every pod is selected by one")


def check_events(
    events: Listing, names: frozenset[str], quiet: frozenset[str], now: datetime
) -> Iterator[Finding]:
    """Warnings of the last hour about objects of these names, each kind once.

    `quiet`: pods whose failed readiness probes are by design.
    """
    if isinstance(events, Denied):
        yield unseen("events", events)
        return
    counts: Counter[tuple[str, str, str]] = Counter()
    for event in events:
        about = text(event, "involvedObject", "name")
        reason = text(event, "reason")
        if about not in names or (about in quiet and reason == "Unhealthy"):
            continue
        when = _time(event)
        if when is not None and now - when > _LATELY:
            continue
        said = printable(text(event, "message"), 160)
        counts[about, reason, said] += int(dig(event, "count") or 1)
    for (about, reason, said), count in counts.most_common(_MOST_EVENTS):
        yield warning(f"event {reason}", f"{about}: {said} ({count}×)", f"kubectl describe {about}")
    if len(counts) > _MOST_EVENTS:
        yield warning(
            "events",
            f"{len(counts) - _MOST_EVENTS} more warnings in the last hour",
            "kubectl get events --field-selector type=Warning",
        )
    if not counts:
        yield ok("events", "no warnings in the last hour")


def _time(event: Raw) -> datetime | None:
    for field in ("lastTimestamp", "eventTime", "firstTimestamp"):
        if when := time_of(event, field):
            return when
    return time_of(event, "metadata", "creationTimestamp")
