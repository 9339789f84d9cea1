"""What is kept of a Kubernetes node or pod: the few fields that the cluster's load is made of.

They come as the API writes them, JSON that was read. Whatever a field holds, reading it raises
nothing: what makes no sense counts as absent, and texts are cut. Accelerators that are handed out
through resource claims (DRA) are on no node's list of resources and are not seen.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from typing import Any

ROLE_LABEL = "dspark.io/role"
# In this order, after the one that is configured.
POOL_LABELS = (
    "cloud.google.com/gke-nodepool",
    "eks.amazonaws.com/nodegroup",
    "karpenter.sh/nodepool",
    "kubernetes.azure.com/agentpool",
    "agentpool",  # older AKS
)
PRODUCT_LABELS = (
    "nvidia.com/gpu.product",
    "amd.com/gpu.product-name",
    "cloud.google.com/gke-accelerator",
    "cloud.google.com/gke-tpu-accelerator",
    "k8s.amazonaws.com/accelerator",
)
# How the names of resources begin that are accelerators, slices and shares of them included.
ACCELERATORS = (
    "nvidia.com/gpu",
    "nvidia.com/mig-",
    "amd.com/gpu",
    "google.com/tpu",
    "gpu.intel.com/",
    "habana.ai/gaudi",
    "aws.amazon.com/neuron",
)

_MAX_NAME = 253  # Kubernetes' own bound of names
_MAX_MESSAGE = 256
_MAX_RESOURCES = 32  # accelerators of different names on one node or pod
_MOST = 2**31  # accelerators of one object; more is no count of anything
_QUANTITY = re.compile(r"([+-]?(?:[0-9]{1,20}\.?[0-9]{0,20}|\.[0-9]{1,20}))([a-zA-Z0-9+-]{0,4})")
_EXPONENT = re.compile(r"[eE]([+-]?[0-9]{1,2})")
_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}

Raw = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Node:
    """A machine."""

    pool: str  # empty: it has none of the labels
    product: str
    ready: bool
    cordoned: bool
    accelerators: Mapping[str, int]  # allocatable, by resource
    refused: tuple[str, ...] = ()  # quantities that could not be read


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that holds accelerators, or waits."""

    namespace: str
    name: str
    role: str  # of ROLE_LABEL; empty without one
    node: str  # empty until it has a place
    pool: str  # that it asks for by name, through its node selector
    pending: bool  # has no place, or its containers have not started
    reason: str
    message: str
    since_s: float  # unix time of the last decision about its place; 0: not told
    accelerators: Mapping[str, int] = field(default_factory=dict)
    refused: tuple[str, ...] = ()


def object_key(raw: Raw) -> tuple[str, str]:
    """(namespace, name); the name is empty in what is no object."""
    metadata = _map(raw.get("metadata"))
    return _text(metadata.get("namespace")), _text(metadata.get("name"))


def read_node(raw: Raw, pool_label: str) -> Node:
    """A node; its pool is named by `pool_label`, else by the label of a large cloud."""
    labels = _map(_map(raw.get("metadata")).get("labels"))
    spec, status = _map(raw.get("spec")), _map(raw.get("status"))
    ready = any(
        condition.get("type") == "Ready" and condition.get("status") == "True"
        for condition in _maps(status.get("conditions"))
    )
    counts, refused = _accelerators(_map(status.get("allocatable")))
    return Node(
        pool=_first(labels, (pool_label, *POOL_LABELS)),
        product=_first(labels, PRODUCT_LABELS),
        ready=ready,
        cordoned=spec.get("unschedulable") is True,
        accelerators=counts,
        refused=refused,
    )


def read_pod(raw: Raw, pool_label: str) -> Pod | None:
    """A pod; None if it neither holds an accelerator nor waits to start."""
    metadata = _map(raw.get("metadata"))
    spec, status = _map(raw.get("spec")), _map(raw.get("status"))
    phase, node = status.get("phase"), _text(spec.get("nodeName"))
    leaving = bool(metadata.get("deletionTimestamp"))
    pending = phase == "Pending" and not leaving
    if phase in ("Succeeded", "Failed") or not (node or pending):
        return None
    counts, refused = _requests(spec)
    if not (pending or counts or refused):
        return None
    placing: Raw = next(
        (c for c in _maps(status.get("conditions")) if c.get("type") == "PodScheduled"), {}
    )
    why = _waiting(status) if node else placing
    namespace, name = object_key(raw)
    return Pod(
        namespace=namespace,
        name=name,
        role=_text(_map(metadata.get("labels")).get(ROLE_LABEL)),
        node=node,
        pool=_first(_map(spec.get("nodeSelector")), (pool_label, *POOL_LABELS)),
        pending=pending,
        reason=_text(why.get("reason")) if pending else "",
        message=_text(why.get("message"), _MAX_MESSAGE) if pending else "",
        since_s=_time(placing.get("lastTransitionTime"))
        or _time(metadata.get("creationTimestamp")),
        accelerators=counts,
        refused=refused,
    )


def read_count(text: object) -> int | None:
    """A Kubernetes quantity, rounded up as Kubernetes does; None if it is none, or no count."""
    found = _QUANTITY.fullmatch(str(text)) if isinstance(text, str | int) else None
    if found is None:
        return None
    number, suffix = Decimal(found[1]), found[2]
    if suffix in _BINARY:
        value = number * 2 ** _BINARY[suffix]
    elif suffix in _DECIMAL:
        value = number.scaleb(_DECIMAL[suffix])
    elif exponent := _EXPONENT.fullmatch(suffix):
        value = number.scaleb(int(exponent[1]))
    else:
        return None
    return int(value.to_integral_value(ROUND_CEILING)) if 0 <= value <= _MOST else None


def _requests(spec: Raw) -> tuple[dict[str, int], tuple[str, ...]]:
    """What a pod needs: its containers together, or more where an init container needs more.

    Init containers run one after the other, but for those that stay (sidecars), which add to all
    that come after them.
    """
    refused: list[str] = []

    def of(container: Raw) -> Counter[str]:
        resources = _map(container.get("resources"))
        # Requests that are left out are the limits.
        counts, bad = _accelerators(
            {**_map(resources.get("limits")), **_map(resources.get("requests"))}
        )
        refused.extend(bad)
        return Counter(counts)

    staying: Counter[str] = Counter()
    peak: Counter[str] = Counter()
    for container in _maps(spec.get("initContainers")):
        need = of(container)
        peak |= staying + need
        if container.get("restartPolicy") == "Always":
            staying += need
    for container in _maps(spec.get("containers")):
        staying += of(container)
    needs = {resource: min(count, _MOST) for resource, count in (peak | staying).items()}
    return needs, tuple(refused[:_MAX_RESOURCES])


def _accelerators(resources: Raw) -> tuple[dict[str, int], tuple[str, ...]]:
    """(counts above 0 by resource, quantities that could not be read)."""
    counts: dict[str, int] = {}
    refused: list[str] = []
    for resource, quantity in resources.items():
        if not resource.startswith(ACCELERATORS) or len(counts) + len(refused) >= _MAX_RESOURCES:
            continue
        count = read_count(quantity)
        if count is None:
            refused.append(_text(f"{resource}: {quantity!r}"[:_MAX_MESSAGE]))
        elif count:
            counts[_text(resource)] = count
    return counts, tuple(refused)


def _waiting(status: Raw) -> Raw:
    """Why the first container that has not started waits."""
    for kind in ("initContainerStatuses", "containerStatuses"):
        for container in _maps(status.get(kind)):
            if waiting := _map(_map(container.get("state")).get("waiting")):
                return waiting
    return {}


def _first(labels: Raw, names: tuple[str, ...]) -> str:
    return next((text for name in names if (text := _text(labels.get(name)))), "")


def _time(text: object) -> float:
    try:
        moment = datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return 0.0
    if moment is None:
        return 0.0
    return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()


def _text(value: object, limit: int = _MAX_NAME) -> str:
    # JSON can spell half a character, which no message could carry on.
    return value[:limit].encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def _map(value: object) -> Raw:
    return value if isinstance(value, dict) else {}


def _maps(value: object) -> list[Raw]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
