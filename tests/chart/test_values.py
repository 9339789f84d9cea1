"""Each key of values.yaml does something, and what is tuned touches serveConfigV2 alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from helpers.chart import (
    CHART,
    SWITCHES,
    Refusal,
    Rendering,
    attempt,
    defaults,
    leaves,
    merged,
    nested,
    profile_values,
)

WIDE = {"modelCache": {"pvc": {"accessModes": ["ReadWriteMany"]}}}
BIG = {part: {"cpu": "8", "memory": "8Gi"} for part in ("requests", "limits")}
GPUS = {"replica": {"gpus": 1}, "gpu": {"count": 2}, "resources": BIG}


def switched(**positions: str) -> dict[str, Any]:
    """The trial profile with switches of the grid in these positions, by the first word."""
    chosen = [
        SWITCHES[name][positions[word]]
        for name in SWITCHES
        if (word := name.split()[0].replace("'s", "")) in positions
    ]
    return merged(profile_values("trial"), WIDE, *chosen)


FULL = {
    "closed": merged(
        switched(
            redis="external", keys="secret", front="ingress", monitoring="on",
            service="load balancer", extras="everywhere",
        ),
        SWITCHES["gRPC's TLS"]["mutual"], SWITCHES["services' TLS"]["issuer"],
        SWITCHES["HTTP's TLS"]["on"],
        {"pools": {"head": {"podDisruptionBudget": {"enabled": True}}}},
    ),
    "certificates": merged(
        switched(front="gateway for gRPC", cache="folder", prefetch="on"),
        SWITCHES["services' TLS"]["issuer"],
    ),
    "scratch": switched(cache="scratch", redis="external, open", scaling="no drafts"),
    "image": switched(cache="image"),
    "grpc certificate": merged(switched(), SWITCHES["gRPC's TLS"]["cert-manager"]),
    "secrets": merged(
        switched(keys="values"), SWITCHES["services' TLS"]["secret"],
        {"tests": {"apiKeyClient": ""}, "apiKeys": {"keys": {"u": "not-a-real-key-9876543210"}}},
    ),
    "hub": switched(prefetch="on"),
    "own store": merged(switched(redis="none"), {"networkPolicy": {"extra": [
        {"name": "store", "spec": {"podSelector": {}}}]}}),
    "gpus": switched(devices="GPUs, spot"),
    "claim given": switched(cache="given claim"),
}  # fmt: skip
# What a key is tried over, first come first served: a key shows where its switch is on.
BASES: dict[str, dict[str, Any]] = {
    "trial": merged(profile_values("trial"), WIDE),
    "by load": merged(profile_values("trial"), WIDE, {"autoscaling": {"enabled": True}}),
    "l4-h100": merged(profile_values("l4-h100"), {"pools": {"draft": GPUS, "verifier": GPUS}}),
    "production": profile_values("production"),
    "spot": merged(profile_values("l4-h100"), {"pools": {"verifier": {"spot": {"enabled": True}}}}),
    **{name: FULL[name] for name in FULL},
}
# Keys that no rule below finds a value for.
OTHER: dict[str, Any] = {
    "nameOverride": "other",
    "fullnameOverride": "other",
    "ray.version": "2.59.0",
    "model.target": "owner/target",
    "model.drafter": "owner/drafter",
    "engine.blockSize": 3,
    "scheduler.storeUrl": "redis://other:6379/3",
    "scheduler.kubernetes.namespace": "*",
    "scheduler.kubernetes.enabled": "off",
    "scheduler.kubernetes.podSelector": "app=other",
    "engine.policy": "off",
    "engine.classes": {"chat": {"weight": 2}},
    "autoscaling.verifier.policy": "module:Class",
    "autoscaling.draft.policy": "module:Class",
    "autoscaling.verifier.minReplicas": 2,
    "network.replicaPorts": "21000-21010",
    "apiKeys.keys": {"other": "0123456789abcdef"},
    "modelCache.pvc.accessModes": ["ReadWriteOnce"],
    "networkPolicy.kubernetesApi.ports": [8443],
    "networkPolicy.extra": [{"name": "other", "spec": {"podSelector": {}}}],
    "service.loadBalancerSourceRanges": ["192.0.2.0/24"],
    "service.externalTrafficPolicy": "Cluster",
    "gatewayApi.parentRefs": [{"name": "other"}],
    "tls.grpc.certManager.issuerRef": {"name": "other"},
    "tls.internal.certManager.issuerRef": {"name": "other"},
    "redis.bundled.image.tag": "other",
}
LAST: dict[str, Any] = {
    "labels": {"other": "x"}, "annotations": {"other": "x"}, "commonLabels": {"other": "x"},
    "commonAnnotations": {"other": "x"}, "alertLabels": {"other": "x"},
    "nodeSelector": {"other": "x"}, "affinity": {"nodeAffinity": {}},
    "tolerations": [{"key": "other", "operator": "Exists"}],
    "topologySpreadConstraints": [{"topologyKey": "other", "maxSkew": 1}],
    "priorityClassName": "other", "runtimeClassName": "other",
    "env": [{"name": "OTHER", "value": "1"}], "envFrom": [{"configMapRef": {"name": "other"}}],
    "volumes": [{"name": "other", "emptyDir": {}}],
    "volumeMounts": [{"name": "other", "mountPath": "/other"}],
    "initContainers": [{"name": "other", "image": "i"}],
    "sidecars": [{"name": "other", "image": "i"}],
    "readinessProbe": {"tcpSocket": {"port": 1}}, "livenessProbe": {"tcpSocket": {"port": 1}},
    "resources": {part: {"cpu": "9", "memory": "9Gi"} for part in ("requests", "limits")},
    "digest": "sha256:" + "0" * 64, "pullSecrets": [{"name": "other"}],
    "minPods": 1, "maxPods": 9, "idleTimeoutSeconds": 77, "minAvailable": 1,
    "drafterBlockSize": 9, "size": "77Gi", "sizeLimit": "77Gi", "duration": "2222h",
    "renewBefore": "333h", "interval": "77s", "hostnames": ["other.example"],
    "httpHostnames": ["other.example"], "grpcHostnames": ["other.example"],
    "dnsNames": ["other.example"], "path": "/other", "resource": "example.com/gpu",
    "logLevel": "DEBUG",
}  # fmt: skip
PEERS = (
    "clients",
    "ingressController",
    "operator",
    "prometheus",
    "dns",
    "redis",
    "downloads",
    "to",
)
# Keys that change nothing on purpose.
SILENT = {
    "global": "helm's own, for charts above this one",
    "production": "refuses values, and renders nothing",
    "model.drafterBlockSize": "checked against engine.blockSize, and not rendered",
    "redis.bundled.password": "it is in a Secret, which is compared without it; see test_security",
}
# Keys that are refused alone, wherever they stand: they go with others. The grid renders both.
TOGETHER = {
    "model.device": "with GPUs of the pools",
    "pools.verifier.tensorParallel": "with as many GPUs of a replica",
    "tls.internal.enabled": "with a certificate",
    "tls.internal.certManager.enabled": "in the place of a Secret",
    "tls.internal.certManager.ownCa": "in the place of an issuer",
    "tls.grpc.enabled": "with a certificate",
    "tls.grpc.certManager.enabled": "in the place of a Secret",
    "tls.http.enabled": "with a Secret",
}
# Where a key shows, to look there first: the start of its path, and the base.
FIRST = {
    "autoscaling.": "by load",
    "autoscaling.enabled": "trial",
    "redis.external": "closed",
    "redis.bundled": "trial",
    "ingress": "closed",
    "gatewayApi": "production",
    "gatewayApi.grpc": "certificates",
    "tls.": "production",
    "tls.http": "closed",
    "tls.internal.existing": "secrets",
    "tls.internal.certManager.issuerRef": "closed",
    "tls.grpc.existing": "closed",
    "tls.grpc.client": "closed",
    "apiKeys": "secrets",
    "apiKeys.existing": "production",
    "monitoring": "production",
    "priorityClasses": "production",
    "modelCache.hostPath": "certificates",
    "modelCache.image": "image",
    "modelCache.emptyDir": "scratch",
    "modelCache.prefetch.tokenSecretKey": "hub",
    "networkPolicy.redis": "production",
    "networkPolicy.ingress": "production",
    "service.load": "closed",
    "service.external": "closed",
    "tests.": "production",
    "scheduler.storeUrl": "own store",
    "pools.verifier.spot": "spot",
    "pools.draft.spot": "l4-h100",
    "pools.draft.gpu": "l4-h100",
    "pools.verifier.gpu": "l4-h100",
    "pools.draft.replica": "l4-h100",
    "pools.verifier.replica": "l4-h100",
    "pools.draft.enabled": "scratch",
    "pools.draft.minPods": "l4-h100",
    "pools.verifier.minPods": "l4-h100",
    "pools.head.podDisruptionBudget": "closed",
    "redis.external.tls.enabled": "scratch",
}


def bases(path: str) -> list[str]:
    """Their names, the likeliest first."""
    likely = max((start for start in FIRST if path.startswith(start)), key=len, default="")
    first = FIRST.get(likely, "trial")
    return [first, *(name for name in BASES if name != first)]


def others(path: str, value: Any) -> Iterator[Any]:
    """Values of the same type to try in the place of `value`."""
    last = path.rsplit(".", 1)[-1]
    choices = schema_of(path).get("enum")
    if path in OTHER:
        yield OTHER[path]
    elif (last in LAST and last != "path") or path == "modelCache.hostPath.path":
        yield LAST[last]
    elif path.startswith("networkPolicy.") and last in PEERS:
        yield [{"ipBlock": {"cidr": "192.0.2.0/24"}}]
    elif choices:
        yield from (one for one in choices if one != value and one not in (True, False))
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value + 1, value * 2, value * 0.9, value / 2 or 0.1)
    elif isinstance(value, str):
        yield "other"


@cache
def schema() -> dict[str, Any]:
    return dict(json.loads((CHART / "values.schema.json").read_text("utf-8")))


def schema_of(path: str) -> dict[str, Any]:
    node = schema()
    for key in path.split("."):
        node = node.get("properties", {}).get(key, {})
    return node


@dataclass(frozen=True)
class Change:
    """What one key alone did to a rendering."""

    base: str
    before: Rendering
    after: Rendering

    def paths(self) -> set[str]:
        def by_name(rendering: Rendering) -> dict[str, Any]:
            return {f"{o['kind']}/{o['metadata']['name']}": o for o in rendering.objects}

        return set(differences(by_name(self.before), by_name(self.after), ""))


def differences(one: Any, other: Any, path: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differences(one.get(key), other.get(key), f"{path}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for a, b in zip(one, other, strict=True):
            yield from differences(a, b, f"{path}[]")
    elif one != other:
        yield path


def change(path: str) -> Change | None:
    """The first base and value with which the key shows; None if there is none."""
    for name in bases(path):
        base = BASES[name]
        before = attempt(base)
        assert isinstance(before, Rendering), before.message
        current: Any = merged(defaults(), base)
        for key in path.split("."):
            current = current[key]
        for value in others(path, current):
            after = attempt(merged(base, nested(path, value)))
            if isinstance(after, Refusal):
                continue
            if comparable(after.text) != comparable(before.text):
                return Change(name, before, after)
    return None


def comparable(text: str) -> str:
    """Without what is drawn anew each time: the bundled Redis' password."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("  password:"))


@pytest.fixture(scope="module")
def changes() -> dict[str, Change | None]:
    left_out = SILENT.keys() | TOGETHER.keys()
    paths = [path for path, _ in leaves(defaults()) if path not in left_out]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(paths, pool.map(change, paths), strict=True))


@pytest.mark.timeout(600)
def test_every_key_changes_something(changes: dict[str, Change | None]) -> None:
    assert [path for path, one in changes.items() if one is None] == []
    assert SILENT.keys() | TOGETHER.keys() <= {path for path, _ in leaves(defaults())}


@pytest.mark.parametrize("path", TOGETHER)
def test_a_key_that_goes_with_others_is_refused_alone(path: str) -> None:
    for name in ("trial", "production", "l4-h100"):
        current: Any = merged(defaults(), BASES[name])
        for key in path.split("."):
            current = current[key]
        for value in others(path, current):
            made = attempt(merged(BASES[name], nested(path, value)))
            if isinstance(made, Rendering):
                # Nothing asks for it here, and it changes nothing.
                before = attempt(BASES[name])
                assert isinstance(before, Rendering)
                assert comparable(made.text) == comparable(before.text)


# What is tuned: the settings of the service. Beside serveConfigV2 these alone may change, and why.
TUNED = ("model", "engine", "draft", "scheduler", "gateway", "autoscaling")
COUNTS = ("verifierReplicas", "draftReplicas", "schedulerReplicas", "gatewayReplicas")
BESIDE = {
    # KubeRay takes these over in the running cluster; pools follow the replicas that they hold.
    ".spec.rayClusterConfig.workerGroupSpecs[].replicas": "",
    ".spec.rayClusterConfig.workerGroupSpecs[].minReplicas": "",
    ".spec.rayClusterConfig.workerGroupSpecs[].maxReplicas": "",
}


@pytest.mark.timeout(600)
def test_tuning_touches_serve_config_alone(changes: dict[str, Change | None]) -> None:
    tuned = 0
    wrong = {}
    for path, one in changes.items():
        if one is None or path.split(".")[0] not in (*TUNED, *COUNTS):
            continue
        paths = one.paths()
        tuned += any(where.endswith(".spec.serveConfigV2") for where in paths)
        ray = {p for p in paths if ".RayService/" in p and not p.endswith(".spec.serveConfigV2")}
        made_anew = {p for p in ray if not p.endswith(tuple(BESIDE))}
        # Beside the cluster: the models that a Job fetches, the one that tests ask, and pods that
        # a budget keeps.
        other = {p for p in paths if ".RayService/" not in p and ".Secret/" not in p}
        sized = path in COUNTS or path.startswith(("model.", "autoscaling."))
        if path.startswith("scheduler."):  # what it asks the API for, it must be allowed
            kinds = (".Role/", ".RoleBinding/", ".ClusterRole/", ".ClusterRoleBinding/")
            other = {p for p in other if not p.startswith(kinds)}
        if made_anew or ((ray or other) and not sized):
            wrong[path] = sorted(made_anew | other)
    assert wrong == {}
    assert tuned > 60
