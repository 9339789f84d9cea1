"""Whether the cluster's nodes can take the pods: labels, taints, accelerators, and room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal

from dspark.cli.kube_doctor.findings import Finding, failed, listed, ok, unseen, warning
from dspark.cli.kube_doctor.manifests import Workload
from dspark.cli.kube_doctor.objects import (
    Denied,
    Listing,
    Raw,
    amount_text,
    condition,
    dig,
    expression_holds,
    items,
    labels_of,
    mapping,
    name_of,
    pod_requests,
    quantities,
    text,
)
from dspark.scheduling.cluster_objects import ACCELERATORS, POOL_LABELS, PRODUCT_LABELS

_TELLING = ("dspark.io/pool", *PRODUCT_LABELS, *POOL_LABELS)


@dataclass
class Room:
    """What is left of a node, by resource, while pods are put on it."""

    node: Raw
    free: dict[str, Decimal]

    def pods_that_fit(self, asked: Mapping[str, Decimal], most: int) -> int:
        """How many, each asking for so much."""
        counts = [
            int(max(self.free.get(resource, Decimal(0)), Decimal(0)) // amount)
            for resource, amount in asked.items()
            if amount > 0
        ]
        return min([most, *counts])

    def take(self, asked: Mapping[str, Decimal], count: int) -> None:
        """Put so many there."""
        for resource, amount in asked.items():
            self.free[resource] = self.free.get(resource, Decimal(0)) - count * amount


def is_accelerator(resource: str) -> bool:
    """As against CPU and memory."""
    return resource.startswith(ACCELERATORS)


def check_placement(
    workloads: tuple[Workload, ...], nodes: Listing, pods: Listing, *, from_zero: bool
) -> Iterator[Finding]:
    """Each workload in turn, on what those before it left free; GPU pools first, as they are rare.

    `from_zero`: nodes come when pods wait for them, so that their absence is no failure.
    """
    if isinstance(nodes, Denied):
        yield unseen("nodes", nodes)
        return
    if isinstance(pods, Denied):
        yield warning(
            "nodes",
            f"what other pods hold is not known: {pods.reason}",
            "the checks of room below count whole nodes as free",
        )
    rooms = [_room(node, () if isinstance(pods, Denied) else pods) for node in nodes]
    yield from _overview(nodes, workloads)
    order = sorted(workloads, key=lambda w: not any(map(is_accelerator, w.requests)))
    for workload in order:
        if workload.most > 0:
            yield _place(workload, rooms, from_zero=from_zero)


def tolerates(spec: Raw, taint: Raw) -> bool:
    """Whether a pod may go to a node with this taint."""
    return any(_tolerates(toleration, taint) for toleration in items(spec, "tolerations"))


def _place(workload: Workload, rooms: list[Room], *, from_zero: bool) -> Finding:
    check = f"pods {workload.name}"
    asked = workload.requests
    size = ", ".join(f"{amount_text(r, a)} {r}" for r, a in sorted(asked.items()) if a)
    matching = [room for room in rooms if _matches(workload.spec, room.node)]
    if not matching:
        remedy = f"label the nodes, or change the pool's nodeSelector; {_labels_there(rooms)}"
        got = f"no node has the labels asked for ({_selector_text(workload.spec)})"
        if from_zero or not workload.least:
            return warning(check, got, f"right, if the autoscaler makes such nodes; else {remedy}")
        return failed(check, got, remedy)
    usable = [room for room in matching if _takes_pods(room.node)]
    if not usable:
        names = [name_of(room.node) for room in matching]
        return failed(
            check,
            f"every node that matches is cordoned or not ready: {listed(names)}",
            "kubectl uncordon them, or see kubectl describe node",
        )
    open_to = [room for room in usable if not _barring(workload.spec, room.node)]
    if not open_to:
        taints = Counter(t for room in usable for t in _barring(workload.spec, room.node))
        (key, value, effect), _ = taints.most_common(1)[0]
        how = f"value: {value}" if value else "operator: Exists"
        return failed(
            check,
            f"{len(usable)} nodes match, and all have a taint that is not tolerated: "
            f"{key}{'=' if value else ''}{value}:{effect}",
            f"add to the pool's tolerations: {{key: {key}, {how}, effect: {effect}}}",
        )
    for resource in filter(is_accelerator, asked):
        if not any(quantities(r.node, "status", "allocatable").get(resource) for r in open_to):
            return failed(
                check,
                f"{len(open_to)} nodes match, and none offers {resource}",
                "install the device plugin (for NVIDIA the GPU operator) or see why it does not "
                "run on them",
            )
    fit = 0
    for room in open_to:
        count = room.pods_that_fit(asked, workload.most - fit)
        room.take(asked, count)
        fit += count
    if fit >= workload.most:
        return ok(check, f"room for {fit} of {size}")
    short = _short(asked, open_to)
    got = f"room for {fit} of {workload.most} pods of {size}; short of {short}"
    if fit < workload.least and not from_zero:
        return failed(check, got, "add nodes, free some, or ask for less")
    return warning(check, got, "the rest wait until nodes come (cluster autoscaler) or are freed")


def _overview(nodes: tuple[Raw, ...], workloads: tuple[Workload, ...]) -> Iterator[Finding]:
    offered: Counter[str] = Counter()
    broken = []
    for node in nodes:
        allocatable = quantities(node, "status", "allocatable")
        for resource, amount in allocatable.items():
            if is_accelerator(resource) and amount:
                offered[f"{_product(node)} ({resource})"] += int(amount)
        if text(labels_of(node), "nvidia.com/gpu.present") == "true" and not any(
            is_accelerator(r) and a for r, a in allocatable.items()
        ):
            broken.append(name_of(node))
    if broken:
        yield failed(
            "device plugin",
            f"{listed(broken)} have GPUs (nvidia.com/gpu.present) and offer none",
            "see the pods of the NVIDIA device plugin or GPU operator on these nodes",
        )
    wanted = any(is_accelerator(r) for w in workloads for r in w.requests)
    told = "; ".join(f"{count} × {name}" for name, count in sorted(offered.items()))
    if offered:
        yield ok("nodes", f"{len(nodes)}, with {told}")
    elif wanted or not workloads:
        yield warning(
            "nodes", f"{len(nodes)}, and no GPU on any", "right for a trial on CPUs, and no other"
        )
    else:
        yield ok("nodes", f"{len(nodes)}, without GPUs, and none are asked for")


def _room(node: Raw, pods: tuple[Raw, ...]) -> Room:
    free = quantities(node, "status", "allocatable")
    for pod in pods:
        here = text(pod, "spec", "nodeName") == name_of(node)
        if here and text(pod, "status", "phase") not in ("Succeeded", "Failed"):
            for resource, amount in pod_requests(mapping(pod, "spec")).items():
                free[resource] = free.get(resource, Decimal(0)) - amount
    return Room(node, free)


def _matches(spec: Raw, node: Raw) -> bool:
    labels = labels_of(node)
    if any(labels.get(k) != v for k, v in mapping(spec, "nodeSelector").items()):
        return False
    terms = _terms(spec)
    return not terms or any(
        all(expression_holds(e, labels) for e in items(term, "matchExpressions")) for term in terms
    )


def _terms(spec: Raw) -> list[Raw]:
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    return items(spec, "affinity", "nodeAffinity", required, "nodeSelectorTerms")


def _selector_text(spec: Raw) -> str:
    said = [f"{k}={v}" for k, v in mapping(spec, "nodeSelector").items()]
    return ", ".join(said + (["its node affinity"] if _terms(spec) else [])) or "none"


def _labels_there(rooms: list[Room]) -> str:
    there = Counter(
        f"{key}={labels_of(room.node)[key]}"
        for room in rooms
        for key in _TELLING
        if key in labels_of(room.node)
    )
    return (
        f"there are {listed([t for t, _ in there.most_common()])}"
        if there
        else ("the nodes have no label that names a pool or a GPU")
    )


def _takes_pods(node: Raw) -> bool:
    ready = text(condition(node, "Ready"), "status") == "True"
    return ready and dig(node, "spec", "unschedulable") is not True


def _barring(spec: Raw, node: Raw) -> list[tuple[str, str, str]]:
    """The taints that keep the pod away, as (key, value, effect)."""
    return [
        (text(taint, "key"), text(taint, "value"), text(taint, "effect"))
        for taint in items(node, "spec", "taints")
        if text(taint, "effect") in ("NoSchedule", "NoExecute") and not tolerates(spec, taint)
    ]


def _tolerates(toleration: Raw, taint: Raw) -> bool:
    if text(toleration, "effect") not in ("", text(taint, "effect")):
        return False
    exists = text(toleration, "operator") == "Exists"
    if not text(toleration, "key"):
        return exists
    if text(toleration, "key") != text(taint, "key"):
        return False
    return exists or text(toleration, "value") == text(taint, "value")


def _short(asked: Mapping[str, Decimal], rooms: list[Room]) -> str:
    """The resource that most of the nodes lack."""
    lacking = Counter(
        resource
        for room in rooms
        for resource, amount in asked.items()
        if room.free.get(resource, Decimal(0)) < amount
    )
    return lacking.most_common(1)[0][0] if lacking else "room on one node"


def _product(node: Raw) -> str:
    labels = labels_of(node)
    return next((str(labels[key]) for key in PRODUCT_LABELS if key in labels), "GPU")
