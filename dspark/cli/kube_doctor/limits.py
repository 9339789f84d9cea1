"""What the namespace forbids: quotas, limit ranges, pod security."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

from dspark.cli.kube_doctor.findings import Finding, failed, listed, ok, unseen, warning
from dspark.cli.kube_doctor.manifests import WantedClaim, Workload
from dspark.cli.kube_doctor.objects import (
    Denied,
    Listing,
    Single,
    add,
    amount_text,
    dig,
    items,
    labels_of,
    name_of,
    quantities,
)

_ENFORCE = "pod-security.kubernetes.io/enforce"


def check_quotas(
    quotas: Listing, workloads: tuple[Workload, ...], claims: tuple[WantedClaim, ...]
) -> Iterator[Finding]:
    """Whether each ResourceQuota leaves room for the fewest pods, and for the most."""
    if isinstance(quotas, Denied):
        yield unseen("quotas", quotas)
        return
    least, most = _needs(workloads, claims, most=False), _needs(workloads, claims, most=True)
    for quota in quotas:
        check = f"quota {name_of(quota)}"
        if dig(quota, "spec", "scopes") or dig(quota, "spec", "scopeSelector"):
            yield ok(check, "of a scope, not counted here")
            continue
        hard, used = quantities(quota, "status", "hard"), quantities(quota, "status", "used")
        short: dict[bool, list[str]] = {True: [], False: []}
        for resource, limit in sorted(hard.items()):
            left = limit - used.get(resource, Decimal(0))
            need, wish = least.get(resource, Decimal(0)), most.get(resource, Decimal(0))
            if wish > left:
                said = amount_text(resource, need if need > left else wish)
                free = amount_text(resource, left)
                short[need > left].append(f"{resource}: {said} asked for, {free} left")
        if short[True]:
            yield failed(check, "; ".join(short[True]), "have it raised, or ask for less")
        elif short[False]:
            yield warning(
                check,
                "; ".join(short[False]),
                "enough to begin with; have it raised, or lower the pools' maxima",
            )
        else:
            yield ok(check, f"room for all in {listed(sorted(hard), 6)}")
    if not quotas:
        yield ok("quotas", "none in this namespace")


def check_limit_ranges(ranges: Listing, workloads: tuple[Workload, ...]) -> Iterator[Finding]:
    """Whether containers stay within each LimitRange."""
    if isinstance(ranges, Denied):
        yield unseen("limit ranges", ranges)
        return
    for limit_range in ranges:
        found = []
        for limit in items(limit_range, "spec", "limits"):
            if dig(limit, "type") == "Container":
                found += _beyond(limit, workloads)
        check = f"limit range {name_of(limit_range)}"
        if found:
            yield failed(check, "; ".join(found), "have it changed, or the pools' resources")
        else:
            yield ok(check, "all containers within it")


def check_namespace(
    namespace: str, found: Single, host_paths: tuple[str, ...]
) -> Iterator[Finding]:
    """There, and its pod security lets the chart's pods in."""
    check = f"namespace {namespace}"
    if isinstance(found, Denied):
        yield unseen(check, found)
        return
    if found is None:
        yield warning(check, "it does not exist", "helm install --create-namespace makes it")
        return
    level = labels_of(found).get(_ENFORCE)
    if host_paths and level in ("baseline", "restricted"):
        yield failed(
            check,
            f"pod security {level} forbids hostPath ({listed(list(host_paths))})",
            "use a claim or an image volume as the model cache, or a namespace of its own",
        )
    elif level:
        yield ok(check, f"pod security {level}, which the chart's pods satisfy")
    else:
        yield ok(check, f"pod security is not enforced; label it {_ENFORCE}=restricted to do so")


def _needs(
    workloads: tuple[Workload, ...], claims: tuple[WantedClaim, ...], *, most: bool
) -> dict[str, Decimal]:
    """By the names that quotas use."""
    total: dict[str, Decimal] = {"persistentvolumeclaims": Decimal(len(claims))}
    total["requests.storage"] = sum((claim.bytes for claim in claims), Decimal(0))
    for workload in workloads:
        count = workload.most if most else workload.least
        add(total, {"pods": Decimal(1)}, count)
        for resource, amount in workload.requests.items():
            add(total, {f"requests.{resource}": amount}, count)
            if resource in ("cpu", "memory"):
                add(total, {resource: amount}, count)
        for container in items(workload.spec, "containers"):
            for resource, amount in quantities(container, "resources", "limits").items():
                add(total, {f"limits.{resource}": amount}, count)
    return total


def _beyond(limit: object, workloads: tuple[Workload, ...]) -> list[str]:
    most, least = quantities(limit, "max"), quantities(limit, "min")
    found = []
    for workload in workloads:
        for container in items(workload.spec, "containers"):
            limits = quantities(container, "resources", "limits")
            asked = {**limits, **quantities(container, "resources", "requests")}
            for resource in sorted(asked):
                high, low = limits.get(resource, asked[resource]), asked[resource]
                said = f"{workload.name}: {resource} "
                if resource in most and high > most[resource]:
                    bound = amount_text(resource, most[resource])
                    found.append(f"{said}{amount_text(resource, high)}, at most {bound}")
                elif resource in least and low < least[resource]:
                    bound = amount_text(resource, least[resource])
                    found.append(f"{said}{amount_text(resource, low)}, at least {bound}")
    return found
