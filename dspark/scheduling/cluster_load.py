"""How full the cluster is, and whether capacity is coming: from nodes and pods to their sums.

The view depends on the objects as they were last told, not on the order in which they came: it is
summed up anew when it is asked for after a change.

`requested` and `free` know of the pods that are told of, and of no others. A scheduler that may see
one namespace sees what its own pods hold.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from dspark.scheduling.cluster_objects import Node, Pod, Raw, object_key, read_node, read_pod

log = logging.getLogger(__name__)

_Key = tuple[str, str]  # namespace, name

MAX_OBJECTS = 200_000  # of a kind; above what Kubernetes itself takes


class Kind(StrEnum):
    """Of which objects."""

    NODES = "nodes"
    PODS = "pods"


@dataclass(frozen=True, slots=True)
class AcceleratorLoad:
    """Accelerators of one resource name in a pool."""

    resource: str
    allocatable: int = 0  # of all nodes
    requested: int = 0  # by pods that have a place
    free: int = 0  # on nodes that take pods: ready and not cordoned
    waiting: int = 0  # asked for by pods without a place


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """Nodes of a pool. Each counts as one of ready, not ready, or cordoned (and ready)."""

    name: str  # empty: nodes of no pool, and pods that may go to any
    ready: int
    not_ready: int
    cordoned: int
    products: tuple[str, ...]
    accelerators: tuple[AcceleratorLoad, ...]


@dataclass(frozen=True, slots=True)
class PendingPod:
    """A pod that has not started."""

    namespace: str
    name: str
    role: str  # empty: it is not labelled with one
    pool: str  # where it is, or that it asks for by name; empty: any
    placed: bool  # has a node; else it waits for one
    reason: str  # Unschedulable, ContainerCreating, …; empty: none told
    message: str
    since_s: float  # unix time; 0: not told


@dataclass(frozen=True, slots=True)
class ClusterLoad:
    """The cluster as Kubernetes tells of it."""

    pools: tuple[PoolLoad, ...] = ()  # by name
    pending: tuple[PendingPod, ...] = ()  # those with a role first, then who waits longest
    refused_quantities: int = 0  # that could not be read; they count as 0


class ClusterInventory:
    """Nodes and pods as last told of. Safe for threads."""

    def __init__(self, pool_label: str) -> None:
        self._pool_label = pool_label
        self._lock = threading.Lock()
        self._known: dict[Kind, dict[_Key, Node | Pod]] = {kind: {} for kind in Kind}
        self._load: ClusterLoad | None = None
        self._warned = False

    def replace(self, kind: Kind, raws: Iterable[Raw]) -> None:
        """All objects of a kind, in place of those known; if `raws` raises, these stay.

        Raises ValueError for more than MAX_OBJECTS.
        """
        told: dict[_Key, Node | Pod] = {}
        for raw in raws:
            self._take(told, kind, raw)
        with self._lock:
            self._known[kind] = told
            self._load = None

    def put(self, kind: Kind, raw: Raw) -> None:
        """An object that was added or has changed; ValueError if it is one too many."""
        with self._lock:
            self._take(self._known[kind], kind, raw)
            self._load = None

    def drop(self, kind: Kind, raw: Raw) -> None:
        """An object that is gone."""
        with self._lock:
            self._known[kind].pop(object_key(raw), None)
            self._load = None

    def load(self) -> ClusterLoad:
        """The sums, made once for each change."""
        with self._lock:
            if self._load is None:
                nodes = {
                    name: item
                    for (_, name), item in self._known[Kind.NODES].items()
                    if isinstance(item, Node)
                }
                pods = [item for item in self._known[Kind.PODS].values() if isinstance(item, Pod)]
                self._load = _sum_up(nodes, pods)
            return self._load

    def _take(self, known: dict[_Key, Node | Pod], kind: Kind, raw: Raw) -> None:
        key = object_key(raw)
        if not key[1]:
            return
        read = read_node if kind is Kind.NODES else read_pod
        item = read(raw, self._pool_label)
        if item is None:
            known.pop(key, None)
            return
        if len(known) >= MAX_OBJECTS and key not in known:
            raise ValueError(
                f"more than {MAX_OBJECTS} {kind} to keep; narrow the namespace or the selector"
            )
        known[key] = item
        if item.refused and not self._warned:  # said once: ClusterLoad counts them
            self._warned = True
            log.warning("%s %s: counted as 0: %s", kind, key[1], "; ".join(item.refused))


@dataclass(slots=True)
class _Sums:
    """A pool while it is added up."""

    ready: int = 0
    not_ready: int = 0
    cordoned: int = 0
    products: set[str] = field(default_factory=set)
    allocatable: Counter[str] = field(default_factory=Counter)
    requested: Counter[str] = field(default_factory=Counter)
    free: Counter[str] = field(default_factory=Counter)
    waiting: Counter[str] = field(default_factory=Counter)

    def done(self, name: str) -> PoolLoad:
        resources = {*self.allocatable, *self.requested, *self.waiting}
        return PoolLoad(
            name=name,
            ready=self.ready,
            not_ready=self.not_ready,
            cordoned=self.cordoned,
            products=tuple(sorted(self.products - {""})),
            accelerators=tuple(
                AcceleratorLoad(
                    resource,
                    self.allocatable[resource],
                    self.requested[resource],
                    self.free[resource],
                    self.waiting[resource],
                )
                for resource in sorted(resources)
            ),
        )


def _sum_up(nodes: Mapping[str, Node], pods: Iterable[Pod]) -> ClusterLoad:
    pools: dict[str, _Sums] = defaultdict(_Sums)
    held: dict[str, Counter[str]] = defaultdict(Counter)  # by node
    pending: list[PendingPod] = []
    refused = sum(len(node.refused) for node in nodes.values())
    for pod in pods:
        refused += len(pod.refused)
        pool = nodes[pod.node].pool if pod.node in nodes else pod.pool
        if pod.node:
            pools[pool].requested.update(pod.accelerators)
            held[pod.node].update(pod.accelerators)
        else:
            pools[pool].waiting.update(pod.accelerators)
        if pod.pending:
            pending.append(
                PendingPod(
                    namespace=pod.namespace,
                    name=pod.name,
                    role=pod.role,
                    pool=pool,
                    placed=bool(pod.node),
                    reason=pod.reason,
                    message=pod.message,
                    since_s=pod.since_s,
                )
            )
    for name, node in nodes.items():
        sums = pools[node.pool]
        sums.ready += node.ready and not node.cordoned
        sums.not_ready += not node.ready
        sums.cordoned += node.ready and node.cordoned
        sums.products.add(node.product)
        sums.allocatable.update(node.accelerators)
        if node.ready and not node.cordoned:
            sums.free.update(Counter(node.accelerators) - held[name])  # never below 0
    pending.sort(key=lambda p: (not p.role, p.since_s, p.namespace, p.name))
    return ClusterLoad(
        pools=tuple(pools[name].done(name) for name in sorted(pools)),
        pending=tuple(pending),
        refused_quantities=refused,
    )
