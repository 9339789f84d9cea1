"""All that is checked of a release, from the API's objects."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from dspark.cli.kube_doctor import pods as release_pods
from dspark.cli.kube_doctor import surroundings
from dspark.cli.kube_doctor.findings import Finding, unseen
from dspark.cli.kube_doctor.kinds import check_operator, operators
from dspark.cli.kube_doctor.manifests import INTERNAL_NAME
from dspark.cli.kube_doctor.objects import Denied, Listing, Raw, mapping, name_of, text
from dspark.cli.kube_doctor.reader import Reader
from dspark.cli.kube_doctor.release import check_rayservices
from dspark.cli.kube_doctor.secrets import check_certificate

_INSTANCE = "app.kubernetes.io/instance"


def check_after(reader: Reader, release: str, namespace: str, now: datetime) -> Iterator[Finding]:
    """One finding after another, as the API answers."""

    def mine(prefix: str, kind: str) -> Listing:
        path = f"{prefix}/namespaces/{namespace}/{kind}"
        return reader.list(path, f"{kind} in {namespace}", labelSelector=f"{_INSTANCE}={release}")

    deployments = reader.list("/apis/apps/v1/deployments", "deployments of all namespaces")
    yield from check_operator(operators(deployments))
    services = mine("/apis/ray.io/v1", "rayservices")
    yield from check_rayservices(services, release, namespace)
    pods = mine("/api/v1", "pods")
    yield from release_pods.check_pods(pods)
    claims = mine("/api/v1", "persistentvolumeclaims")
    yield from surroundings.check_release_claims(claims)
    yield from _certificates(reader, pods, namespace, now)
    budgets = mine("/apis/policy/v1", "poddisruptionbudgets")
    yield from surroundings.check_budgets(budgets)
    policies = reader.list(
        f"/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies",
        f"networkpolicies in {namespace}",
    )
    yield from surroundings.check_policies(policies, pods)
    events = reader.list(
        f"/api/v1/namespaces/{namespace}/events",
        f"events in {namespace}",
        fieldSelector="type=Warning",
    )
    quiet = _names(tuple(filter(release_pods.is_empty_worker, _seen(pods))))
    names = _names((*_seen(services), *_seen(pods), *_seen(claims), *_seen(budgets)))
    clusters = frozenset(
        text(service, "status", which, "rayClusterName")
        for service in _seen(services)
        for which in ("activeServiceStatus", "pendingServiceStatus")
    )
    yield from surroundings.check_events(events, names | clusters - {""}, quiet, now)


def _certificates(
    reader: Reader, pods: Listing, namespace: str, now: datetime
) -> Iterator[Finding]:
    """Of every TLS secret that the pods mount."""
    mounted = {
        (text(volume, "secret", "secretName"), text(volume, "name"))
        for pod in _seen(pods)
        for volume in mapping(pod, "spec").get("volumes") or ()
        if text(volume, "secret", "secretName")
    }
    for name, volume in sorted(mounted):
        check = f"certificate {name}"
        secret = reader.get(f"/api/v1/namespaces/{namespace}/secrets/{name}", "secrets")
        if isinstance(secret, Denied):
            yield unseen(check, secret)
        elif secret is not None and "tls.crt" in mapping(secret, "data"):
            dns_name = INTERNAL_NAME if "internal" in volume else ""
            yield from check_certificate(check, secret, dns_name, now)


def _seen(found: Listing) -> tuple[Raw, ...]:
    return () if isinstance(found, Denied) else found


def _names(found: Listing) -> frozenset[str]:
    return frozenset(name_of(raw) for raw in _seen(found))
