"""The cluster's nodes and pods, followed through the Kubernetes API (docs/kubernetes-load.md)."""

from __future__ import annotations

from typing import Any

from kubernetes import client

from dspark.config import KubernetesConfig
from dspark.scheduling.cluster_load import ClusterInventory, ClusterLoad, Kind
from dspark.services.scheduler.list_watch import Call, ListWatch, Waits

EVERY_NAMESPACE = "*"


class KubernetesWatch:
    """What the API tells, and how old that is. Its threads end with `stop`."""

    def __init__(
        self, api: client.ApiClient, config: KubernetesConfig, namespace: str, waits: Waits
    ) -> None:
        self._inventory = ClusterInventory(config.pool_label)
        core = client.CoreV1Api(api)
        self._watches = {
            Kind.NODES: ListWatch(
                Kind.NODES,
                core.list_node,
                self._inventory,
                "grant `list` and `watch` on `nodes` in a ClusterRole (docs/kubernetes-load.md)",
                waits,
            ),
            Kind.PODS: ListWatch(
                Kind.PODS,
                _pods(core, namespace, config.pod_selector),
                self._inventory,
                f"grant `list` and `watch` on `pods` in namespace {namespace!r} "
                "(docs/kubernetes-load.md)",
                waits,
            ),
        }
        for watch in self._watches.values():
            watch.start()

    def load(self) -> ClusterLoad:
        """As last told; it stays when the API is gone."""
        return self._inventory.load()

    def age_s(self, kind: Kind) -> float | None:
        """Since the API last said anything of `kind`; None: never yet.

        Where nothing happens, bookmarks keep it at a minute or two.
        """
        return self._watches[kind].age_s()

    def stop(self) -> None:
        """Break off both watches; does not block."""
        for watch in self._watches.values():
            watch.stop()

    def join(self, timeout_s: float) -> bool:
        """Whether both threads have ended; each is waited for that long."""
        return all(watch.join(timeout_s) for watch in self._watches.values())


def _pods(core: Any, namespace: str, selector: str) -> Call:
    def call(**query: Any) -> Any:
        if selector:
            query["label_selector"] = selector
        if namespace == EVERY_NAMESPACE:
            return core.list_pod_for_all_namespaces(**query)
        return core.list_namespaced_pod(namespace, **query)

    return call
