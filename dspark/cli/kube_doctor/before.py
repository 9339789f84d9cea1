"""All that is checked before an install, from the API's objects."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from dspark.cli.kube_doctor import limits, placement, redis_reach, secrets, storage
from dspark.cli.kube_doctor.findings import Finding
from dspark.cli.kube_doctor.kinds import (
    check_kinds,
    check_operator,
    check_rights,
    check_version,
    operators,
    resource_of,
)
from dspark.cli.kube_doctor.manifests import Wanted
from dspark.cli.kube_doctor.objects import Denied
from dspark.cli.kube_doctor.reader import Reader

# Groups without a dot, and those that Kubernetes itself serves.
_BUILT_IN = ("k8s.io",)
_NOT_BUILT_IN = ("gateway.networking.k8s.io",)
# Of the chart's kinds those that are in no namespace, so that rights in one are none to them.
_CLUSTER_WIDE = ("clusterroles", "clusterrolebindings", "priorityclasses")


def check_before(
    reader: Reader, wanted: Wanted, namespace: str, now: datetime, *, from_zero: bool
) -> Iterator[Finding]:
    """One finding after another, as the API answers."""
    version = reader.get("/version", "/version")
    if isinstance(version, dict):
        yield from check_version(version)
    yield from _kinds(reader, wanted, namespace)
    nodes = reader.list("/api/v1/nodes", "nodes")
    pods = reader.list("/api/v1/pods", "pods of all namespaces")
    yield from placement.check_placement(wanted.workloads, nodes, pods, from_zero=from_zero)
    yield from _storage(reader, wanted, namespace)
    home = f"/api/v1/namespaces/{namespace}"
    there = {
        secret.name: reader.get(f"{home}/secrets/{secret.name}", f"secrets in {namespace}")
        for secret in wanted.secrets
    }
    yield from secrets.check_secrets(wanted.secrets, there, now)
    for url in wanted.redis_urls:
        yield from _redis(reader, url, wanted, namespace)
    quotas = reader.list(f"{home}/resourcequotas", f"resourcequotas in {namespace}")
    yield from limits.check_quotas(quotas, wanted.workloads, wanted.claims)
    ranges = reader.list(f"{home}/limitranges", f"limitranges in {namespace}")
    yield from limits.check_limit_ranges(ranges, wanted.workloads)
    found = reader.get(home, "namespaces")
    yield from limits.check_namespace(namespace, found, wanted.host_paths)


def _kinds(reader: Reader, wanted: Wanted, namespace: str) -> Iterator[Finding]:
    versions = {version for version, _ in wanted.kinds if _comes_with_a_crd(version)}
    served = {version: reader.get(f"/apis/{version}", version) for version in versions}
    yield from check_kinds(wanted.kinds, served)
    deployments = reader.list("/apis/apps/v1/deployments", "deployments of all namespaces")
    yield from check_operator(operators(deployments))
    resources = sorted(
        (version.rpartition("/")[0], resource_of(kind)) for version, kind in wanted.kinds
    )
    may = {
        (group, resource): reader.may(
            "create", group, resource, "" if resource in _CLUSTER_WIDE else namespace
        )
        for group, resource in resources
    }
    yield from check_rights(may, namespace)


def _comes_with_a_crd(version: str) -> bool:
    group = version.rpartition("/")[0]
    return "." in group and (group in _NOT_BUILT_IN or not group.endswith(_BUILT_IN))


def _storage(reader: Reader, wanted: Wanted, namespace: str) -> Iterator[Finding]:
    classes = reader.list("/apis/storage.k8s.io/v1/storageclasses", "storageclasses")
    there = reader.list(
        f"/api/v1/namespaces/{namespace}/persistentvolumeclaims",
        f"persistentvolumeclaims in {namespace}",
    )
    if not wanted.workloads:
        yield from storage.check_default_class(classes)
    yield from storage.check_claims(wanted.claims, wanted.existing_claims, classes, there)


def _redis(reader: Reader, url: str, wanted: Wanted, namespace: str) -> Iterator[Finding]:
    service = redis_reach.service_of(url, namespace)
    if service is None or (redis_reach.in_cluster() and service[1] not in wanted.made_services):
        yield from redis_reach.dial(url)
        return
    made = service == (namespace, service[1]) and service[1] in wanted.made_services
    slices = (
        ()
        if made
        else reader.list(
            f"/apis/discovery.k8s.io/v1/namespaces/{service[0]}/endpointslices",
            f"endpointslices in {service[0]}",
            labelSelector=f"kubernetes.io/service-name={service[1]}",
        )
    )
    assert isinstance(slices, tuple | Denied)
    yield from redis_reach.check_service(url, slices, made=made)
