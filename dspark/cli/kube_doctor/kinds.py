"""The API server's version, the kinds that it serves, KubeRay's operator, and what one may do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from dspark.cli.kube_doctor.findings import Finding, failed, listed, ok, unseen, warning
from dspark.cli.kube_doctor.objects import (
    Denied,
    Listing,
    Raw,
    Single,
    condition,
    dig,
    items,
    labels_of,
    name_of,
    printable,
    text,
)

LEAST_KUBERNETES = (1, 30)
LEAST_KUBERAY = (1, 7)
# Whose kinds they are, and how they come into a cluster.
_OWNERS = {
    "ray.io": "KubeRay: helm install kuberay-operator kuberay/kuberay-operator",
    "cert-manager.io": "cert-manager, or give the chart certificates of your own",
    "monitoring.coreos.com": "the Prometheus operator, or switch the chart's monitors off",
    "gateway.networking.k8s.io": "the Gateway API's CRDs, or switch the chart's gateway off",
}


def check_version(version: Raw) -> Iterator[Finding]:
    """Of the API server, from /version."""
    found = _version(f"{text(version, 'major')}.{text(version, 'minor')}")
    said = text(version, "gitVersion") or "of no version that it tells"
    least = ".".join(map(str, LEAST_KUBERNETES))
    if found >= LEAST_KUBERNETES:
        yield ok("Kubernetes", f"{said} answers")
    else:
        yield failed("Kubernetes", f"{said}", f"the chart needs {least} or newer: upgrade")


def check_kinds(
    wanted: frozenset[tuple[str, str]], served: Mapping[str, Single]
) -> Iterator[Finding]:
    """Whether the API serves the kinds; `served`: discovery of versions that are not built in."""
    for version in sorted(served):
        kinds = sorted(kind for v, kind in wanted if v == version)
        resources = served[version]
        if isinstance(resources, Denied):
            yield unseen(version, resources)
            continue
        there = {text(r, "kind") for r in items(resources, "resources")}
        missing = [kind for kind in kinds if kind not in there]
        if missing:
            group = version.partition("/")[0]
            owner = _OWNERS.get(group, f"what brings {group}")
            yield failed(version, f"{listed(missing)} not served", f"install {owner}")
        else:
            yield ok(version, f"{listed(kinds)} served")


def operators(deployments: Listing) -> Listing:
    """KubeRay's among all deployments, by label or image."""
    if isinstance(deployments, Denied):
        return deployments
    return tuple(d for d in deployments if _is_operator(d))


def check_operator(found: Listing) -> Iterator[Finding]:
    """KubeRay's: there, running, new enough."""
    check = "KubeRay operator"
    if isinstance(found, Denied):
        yield unseen(check, found)
        return
    if not found:
        yield failed(
            check,
            "no deployment of it in any namespace",
            f"install {_OWNERS['ray.io']}; without it nothing comes of a RayService",
        )
    for deployment in found:
        where = f"{text(deployment, 'metadata', 'namespace')}/{name_of(deployment)}"
        available = condition(deployment, "Available")
        if text(available, "status") != "True" or not dig(
            deployment, "status", "availableReplicas"
        ):
            said = printable(text(available, "message")) or "no replica is available"
            yield failed(
                check,
                f"{where} is down: {said}",
                f"kubectl -n {text(deployment, 'metadata', 'namespace')} describe deployment "
                f"{name_of(deployment)}",
            )
            continue
        tag = _operator_tag(deployment)
        least = ".".join(map(str, LEAST_KUBERAY))
        if not _version(tag):
            yield warning(
                check,
                f"{where} runs {tag or 'an image without a tag'}, whose version is not told",
                f"make sure that it is {least} or newer",
            )
        elif _version(tag) < LEAST_KUBERAY:
            yield failed(
                check,
                f"{where} runs {tag}",
                f"the chart needs {least} or newer: upgrade the operator and its CRDs (helm does "
                "not upgrade CRDs by itself)",
            )
        else:
            yield ok(check, f"{where} runs {tag}")


def resource_of(kind: str) -> str:
    """The plural by which the API names a kind, as Kubernetes guesses it."""
    low = kind.lower()
    if low.endswith("s"):
        return low + "es"
    return low[:-1] + "ies" if low.endswith("y") else low + "s"


def check_rights(may: Mapping[tuple[str, str], bool | Denied], namespace: str) -> Iterator[Finding]:
    """Whether whoever asks may make what the chart makes; `may`: by (group, resource)."""
    check = "rights"
    denied = [answer for answer in may.values() if isinstance(answer, Denied)]
    if denied:
        yield unseen(check, denied[0])
        return
    refused = [
        f"{resource}.{group}".rstrip(".") for (group, resource), yes in may.items() if not yes
    ]
    if refused:
        yield failed(
            check,
            f"you may not create {listed(sorted(refused), 8)} in {namespace}",
            "have someone grant it, or install with an account that may",
        )
    else:
        yield ok(check, f"you may create all {len(may)} kinds of the chart in {namespace}")


def _is_operator(deployment: Raw) -> bool:
    labels = labels_of(deployment)
    return "kuberay-operator" in (
        labels.get("app.kubernetes.io/name"),
        labels.get("app.kubernetes.io/component"),
    ) or "kuberay/operator" in _image(deployment)


def _image(deployment: Raw) -> str:
    containers = items(deployment, "spec", "template", "spec", "containers")
    return text(containers[0], "image") if containers else ""


def _operator_tag(deployment: Raw) -> str:
    name = _image(deployment).partition("@")[0].rpartition("/")[2]
    return name.partition(":")[2]


def _version(words: str) -> tuple[int, ...]:
    found = re.match(r"v?(\d+)\.(\d+)", words)
    return (int(found[1]), int(found[2])) if found else ()
