"""Which pods of a release are not well, and why.

A worker without a replica has no Serve proxy, so that KubeRay's probe never calls it ready: that is
by design and no fault. Whether enough replicas are up is for the applications' statuses to say.
"""

from __future__ import annotations

from collections.abc import Iterator

from dspark.cli.kube_doctor.findings import Finding, failed, listed, ok, unseen, warning
from dspark.cli.kube_doctor.objects import (
    Denied,
    Listing,
    Raw,
    condition,
    dig,
    items,
    labels_of,
    mapping,
    name_of,
    printable,
    text,
)

_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
_CONFIG = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")


def check_pods(pods: Listing) -> Iterator[Finding]:
    """A finding for each that is not well, and one for all others."""
    if isinstance(pods, Denied):
        yield unseen("pods", pods)
        return
    well, empty = 0, []
    for pod in pods:
        problem = _problem(pod)
        if problem is not None:
            yield problem
        elif is_empty_worker(pod):
            empty.append(name_of(pod))
        else:
            well += 1
    if not pods:
        yield failed("pods", "the release has none", "see the operator's log and its events")
    elif empty:
        yield ok(
            "pods",
            f"{well} well; {len(empty)} workers run without being ready, as those without a "
            f"replica do: {listed(empty)}",
        )
    else:
        yield ok("pods", f"{well} well")


def is_empty_worker(pod: Raw) -> bool:
    """A worker of Ray whose containers run, and that is not ready."""
    return (
        labels_of(pod).get("ray.io/node-type") == "worker"
        and text(pod, "status", "phase") == "Running"
        and text(condition(pod, "Ready"), "status") != "True"
        and all(mapping(s, "state", "running") for s in items(pod, "status", "containerStatuses"))
    )


def _problem(pod: Raw) -> Finding | None:
    check = f"pod {name_of(pod)}"
    phase = text(pod, "status", "phase")
    if phase == "Succeeded":
        return None
    if phase == "Failed":
        said = printable(text(pod, "status", "message")) or _ended(pod) or "no message"
        return failed(check, f"{text(pod, 'status', 'reason') or 'failed'}: {said}", _logs(pod))
    statuses = [
        *items(pod, "status", "initContainerStatuses"),
        *items(pod, "status", "containerStatuses"),
    ]
    for status in statuses:
        if found := _container(check, pod, status):
            return found
    placed = condition(pod, "PodScheduled")
    if text(placed, "status") == "False":
        return failed(
            check,
            f"no node takes it: {printable(text(placed, 'message'))}",
            "dspark doctor --kube with --values says which of labels, taints and room it is",
        )
    if dig(pod, "metadata", "deletionTimestamp"):
        return warning(check, "being ended", "it drains; no fault unless it stays")
    if phase == "Pending":
        return warning(check, "its containers have not started", "see kubectl describe pod")
    ready = text(condition(pod, "Ready"), "status") == "True"
    if ready or is_empty_worker(pod):
        return None
    said = printable(text(condition(pod, "Ready"), "message")) or "not ready"
    return failed(check, said, f"see kubectl describe pod {name_of(pod)}")


def _container(check: str, pod: Raw, status: Raw) -> Finding | None:
    name = text(status, "name")
    waiting = mapping(status, "state", "waiting")
    reason, said = text(waiting, "reason"), printable(text(waiting, "message"))
    last = mapping(status, "lastState", "terminated") or mapping(status, "state", "terminated")
    if reason in _IMAGE:
        return failed(
            check,
            f"{text(status, 'image')} cannot be pulled: {said or reason}",
            "correct image.* in the values, or give image.pullSecrets",
        )
    if reason in _CONFIG:
        return failed(check, f"{name}: {reason}: {said}", "make the secret or map that it names")
    if text(last, "reason") == "OOMKilled":
        return failed(
            check,
            f"{name} was killed for memory, {dig(status, 'restartCount')} restarts",
            "raise the pool's memory, or lower the engine's cache_tokens",
        )
    if reason == "CrashLoopBackOff":
        code = dig(last, "exitCode")
        why = printable(text(last, "message") or text(last, "reason"))
        return failed(
            check,
            f"{name} crashes again and again, exit code {code}{f' ({why})' if why else ''}",
            _logs(pod),
        )
    return None


def _ended(pod: Raw) -> str:
    for status in items(pod, "status", "containerStatuses"):
        if last := mapping(status, "state", "terminated"):
            return (
                f"{text(status, 'name')}: {text(last, 'reason')}, exit code {dig(last, 'exitCode')}"
            )
    return ""


def _logs(pod: Raw) -> str:
    namespace = text(pod, "metadata", "namespace")
    return f"kubectl -n {namespace} logs {name_of(pod)} --all-containers --previous"
