"""An election by a Kubernetes Lease (coordination.k8s.io/v1), as the control plane's own.

Every write carries the resourceVersion that was read: of two at the same time one is refused with
409, and has lost. Whether another's lease has run out is counted on our clock from when we first
saw its last renewal, so clocks of different machines are never compared. `leaseTransitions` is the
fencing token: it grows with each holder, and is never less than `least_token`, since a Lease that
was deleted would start from 0 again.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from dspark.errors import ConfigError, UnavailableError
from dspark.store import Holding, least_token

T = TypeVar("T")

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_CONFLICT, _NOT_FOUND = 409, 404
_REQUEST_S = 2.0  # connecting and reading, at most


class KubernetesElection:
    """Calls block, and so run in threads; each ends within a bounded time."""

    # Who cannot reach the API server is more likely cut off than alone: API servers are redundant.
    leads_through_outage = False

    def __init__(
        self,
        namespace: str,
        name: str,
        api: Any = None,  # kubernetes.client.CoordinationV1Api; None: the pod's own
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        try:
            from kubernetes import client
            from urllib3.exceptions import HTTPError
        except ImportError as error:
            raise ConfigError(
                "leader_election: kubernetes needs the client: pip install 'dspark-serve[kube]'"
            ) from error
        self._models, self._refused = client, client.ApiException
        self._failures = (client.ApiException, HTTPError, OSError, ValueError)
        self._namespace, self._name = namespace or _own_namespace(), name
        self._api = api or client.CoordinationV1Api(_own_client())
        self._clock = clock
        self._seen: tuple[Any, float] = (None, -math.inf)  # resourceVersion, when it was new to us

    async def acquire(
        self, holder: str, lease_s: float, *, above: int = 0, force: bool = False
    ) -> Holding:
        """Take the lease or renew it; who holds it then."""
        return await self._call(self._acquire, holder, lease_s, above, force)

    async def release(self, holder: str) -> None:
        """Give it back."""
        await self._call(self._release, holder)

    async def _call(self, blocking: Callable[..., T], *arguments: Any) -> T:
        try:
            return await asyncio.to_thread(blocking, *arguments)
        except self._failures as error:
            status = getattr(error, "status", None)
            what = type(error).__name__ if status is None else f"HTTP {status}"
            raise UnavailableError(
                f"the Lease {self._namespace}/{self._name} cannot be used: {what}; does the "
                "service account have get, create and update on leases?"
            ) from error

    def _acquire(self, holder: str, lease_s: float, above: int, force: bool) -> Holding:
        lease = self._read()
        if lease is not None and not force and lease.spec.holder_identity not in ("", None, holder):
            version = lease.metadata.resource_version
            if version != self._seen[0]:
                self._seen = (version, self._clock())
            if self._clock() < self._seen[1] + (lease.spec.lease_duration_seconds or 0):
                return _holding(lease)
        try:
            return _holding(self._take(lease, holder, lease_s, above))
        except self._refused as error:
            if error.status != _CONFLICT:
                raise
        lease = self._read()  # another was first
        if lease is None:
            raise UnavailableError(f"the Lease {self._name} is being deleted; trying again")
        return _holding(lease)

    def _take(self, lease: Any, holder: str, lease_s: float, above: int) -> Any:
        """Write `holder` into the Lease, with a new token unless it is the holder already."""
        # Kubernetes wants microseconds, and isoformat() leaves out those that are 0.
        now = datetime.now(UTC)
        now = now.replace(microsecond=now.microsecond or 1)
        where: dict[str, Any] = {"namespace": self._namespace, "_request_timeout": _REQUEST_S}
        if lease is None:
            lease = self._models.V1Lease(
                api_version="coordination.k8s.io/v1",
                kind="Lease",
                metadata=self._models.V1ObjectMeta(name=self._name, namespace=self._namespace),
                spec=self._models.V1LeaseSpec(),
            )
            write = self._api.create_namespaced_lease
        else:
            write = self._api.replace_namespaced_lease
            where["name"] = self._name
        spec = lease.spec
        if spec.holder_identity != holder:
            latest = max(spec.lease_transitions or 0, above)
            spec.lease_transitions = max(latest + 1, least_token(time.time()))
            spec.holder_identity, spec.acquire_time = holder, now
        spec.renew_time, spec.lease_duration_seconds = now, math.ceil(lease_s)
        return write(body=lease, **where)

    def _release(self, holder: str) -> None:
        lease = self._read()
        if lease is None or lease.spec.holder_identity != holder:
            return
        lease.spec.holder_identity = ""
        try:
            self._api.replace_namespaced_lease(
                self._name, self._namespace, lease, _request_timeout=_REQUEST_S
            )
        except self._refused as error:
            if error.status not in (_CONFLICT, _NOT_FOUND):  # it is another's, or gone, already
                raise

    def _read(self) -> Any:
        """The Lease, or None if there is none yet."""
        try:
            lease = self._api.read_namespaced_lease(
                self._name, self._namespace, _request_timeout=_REQUEST_S
            )
        except self._refused as error:
            if error.status != _NOT_FOUND:
                raise
            return None
        if lease.spec is None:  # somebody made it by hand
            lease.spec = self._models.V1LeaseSpec()
        return lease


def _holding(lease: Any) -> Holding:
    return Holding(lease.spec.holder_identity or "", lease.spec.lease_transitions or 0)


def _own_namespace() -> str:
    try:
        return _NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(
            "kubernetes_namespace is not set, and this is no pod that would tell its own: set it"
        ) from error


def _own_client() -> Any:
    """The API client of the pod's service account, else of the user's kubeconfig."""
    from kubernetes import client, config

    settings = client.Configuration()
    try:
        try:
            config.load_incluster_config(client_configuration=settings)
        except config.ConfigException:
            config.load_kube_config(client_configuration=settings)
    except config.ConfigException as error:
        raise ConfigError(f"no Kubernetes API to hold elections by: {error}") from error
    settings.retries = False  # the next try comes by itself, and a renewal must not wait
    return client.ApiClient(settings)
