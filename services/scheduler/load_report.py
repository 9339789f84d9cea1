"""What Kubernetes tells, as a message."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspark.pb import scheduler_pb2 as pb
from dspark.scheduling.cluster_load import Kind, PendingPod, PoolLoad

if TYPE_CHECKING:  # it needs an extra
    from dspark.services.scheduler.kubernetes_watch import KubernetesWatch

_LISTED = 100  # pending pods


def load_to_pb(watch: KubernetesWatch) -> pb.ClusterLoad:
    """The load and its age."""
    load = watch.load()
    return pb.ClusterLoad(
        pools=map(_pool, load.pools),
        pending=map(_pending, load.pending[:_LISTED]),
        pending_pods=len(load.pending),
        refused_quantities=load.refused_quantities,
        nodes_age_ms=_ms(watch.age_s(Kind.NODES)),
        pods_age_ms=_ms(watch.age_s(Kind.PODS)),
    )


def _pool(pool: PoolLoad) -> pb.PoolLoad:
    return pb.PoolLoad(
        name=pool.name,
        nodes_ready=pool.ready,
        nodes_not_ready=pool.not_ready,
        nodes_cordoned=pool.cordoned,
        products=pool.products,
        accelerators=[
            pb.AcceleratorLoad(
                resource=a.resource,
                allocatable=a.allocatable,
                requested=a.requested,
                free=a.free,
                waiting=a.waiting,
            )
            for a in pool.accelerators
        ],
    )


def _pending(pod: PendingPod) -> pb.PendingPod:
    return pb.PendingPod(
        namespace=pod.namespace,
        name=pod.name,
        role=pod.role,
        pool=pod.pool,
        placed=pod.placed,
        reason=pod.reason,
        message=pod.message,
        since_unix_ms=max(0, round(pod.since_s * 1000)),
    )


def _ms(age_s: float | None) -> int | None:
    return None if age_s is None else round(age_s * 1000)
