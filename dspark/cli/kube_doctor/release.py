"""Whether the RayService of a release is up, and what Ray Serve says of its applications."""

from __future__ import annotations

from collections.abc import Iterator

from dspark.cli.kube_doctor.findings import Finding, failed, ok, unseen, warning
from dspark.cli.kube_doctor.objects import (
    Denied,
    Listing,
    Raw,
    condition,
    dig,
    mapping,
    name_of,
    printable,
    text,
)

# Until which nothing is amiss: KubeRay and Serve are at it.
_ON_ITS_WAY = ("", "NOT_STARTED", "DEPLOYING", "UPDATING", "UPSCALING", "DOWNSCALING", "DELETING")


def check_rayservices(found: Listing, release: str, namespace: str) -> Iterator[Finding]:
    """The conditions, and each application and deployment with its message."""
    if isinstance(found, Denied):
        yield unseen("RayService", found)
        return
    if not found:
        yield failed(
            "RayService",
            f"none with app.kubernetes.io/instance={release} in {namespace}",
            "give the release and namespace of `helm list -A`",
        )
    for service in found:
        yield _ready(service)
        yield from _upgrade(service)
        yield from _applications(service)


def _ready(service: Raw) -> Finding:
    check = f"RayService {name_of(service)}"
    ready = condition(service, "Ready")
    said = printable(text(ready, "message"))
    if text(ready, "status") == "True":
        endpoints = dig(service, "status", "numServeEndpoints") or 0
        if not endpoints:
            return warning(check, "ready, with no endpoints", "see the gateway's pods below")
        return ok(check, f"ready, {endpoints} endpoints")
    if text(ready, "reason") == "InitializingTimeout":
        return failed(
            check,
            f"it was given up: {said}",
            "KubeRay never tries such a one again: delete the RayService and run helm upgrade",
        )
    if not ready:
        return failed(
            check,
            "KubeRay has said nothing of it",
            "see the operator's log, and whether it watches this namespace",
        )
    return failed(
        check,
        f"not ready: {text(ready, 'reason')}: {said}",
        "the checks below say what it waits for",
    )


def _upgrade(service: Raw) -> Iterator[Finding]:
    check = f"upgrade of {name_of(service)}"
    pending = text(service, "status", "pendingServiceStatus", "rayClusterName")
    if text(condition(service, "RollbackInProgress"), "status") == "True":
        yield warning(check, "being rolled back", "see the new cluster's pods for the reason")
    elif pending and text(service, "status", "activeServiceStatus", "rayClusterName"):
        yield warning(
            check,
            f"cluster {pending} is being made beside the one that serves: twice the GPUs",
            "wait; if its pods stay Pending, add nodes or undo the change (helm rollback)",
        )


def _applications(service: Raw) -> Iterator[Finding]:
    for which in ("activeServiceStatus", "pendingServiceStatus"):
        applications = mapping(service, "status", which, "applicationStatuses")
        for name, application in sorted(applications.items()):
            yield _application(str(name), application)


def _application(name: str, application: object) -> Finding:
    check = f"application {name}"
    status, said = text(application, "status"), printable(text(application, "message"))
    worst = [
        f"{deployment}: {text(raw, 'status')} {printable(text(raw, 'message'))}".rstrip()
        for deployment, raw in mapping(application, "serveDeploymentStatuses").items()
        if text(raw, "status") not in ("HEALTHY", "")
    ]
    told = "; ".join([said, *worst]).strip("; ") or "no message"
    if status == "RUNNING":
        return ok(check, "running")
    if status in _ON_ITS_WAY:
        return warning(
            check, f"{status.lower() or 'unknown'}: {told}", "wait; a large model loads for minutes"
        )
    return failed(check, f"{status.lower()}: {told}", "see the replicas' logs in Ray's dashboard")
