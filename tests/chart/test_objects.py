"""Every object of every profile and of a grid of switches: schemas, names, labels."""

from __future__ import annotations

import copy
import re
import subprocess
from typing import Any

import pytest
import yaml
from helpers.chart import (
    CHART,
    KUBERNETES,
    NAMESPACE,
    PROFILES,
    RELEASE,
    cases,
    helm,
    merged,
    render,
)
from helpers.chart import profile_values as values_of
from helpers.kube_schemas import faults

NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
LABEL = re.compile(r"(([a-z0-9.-]{1,253})/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
every = pytest.mark.parametrize("case", cases())


@pytest.mark.parametrize("profile", PROFILES)
def test_lint_has_nothing_to_say(profile: str) -> None:
    files = [part for name in PROFILES[profile] for part in ("--values", str(CHART / name))]
    sets = ["--set-json", 'modelCache.pvc.accessModes=["ReadWriteMany"]']
    ran = subprocess.run(
        [helm(), "lint", "--strict", "--quiet", "--kube-version", KUBERNETES, *files, *sets, CHART],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "WARNING" not in ran.stdout + ran.stderr


@every
def test_schemas_know_every_field(case: str) -> None:
    wrong = {
        f"{one['kind']} {one['metadata']['name']}": found
        for one in render(cases()[case]).objects
        if (found := faults(one))
    }
    assert not wrong


def misspelt(one: dict[str, Any], *path: str | int) -> dict[str, Any]:
    """A copy with a key that nobody knows."""
    made = copy.deepcopy(one)
    inner: Any = made
    for key in path:
        inner = inner[key]
    inner["misspelt"] = "x"
    return made


@pytest.mark.parametrize(
    "path",
    [
        ("spec",),
        ("spec", "rayClusterConfig"),
        ("spec", "rayClusterConfig", "autoscalerOptions"),
        ("spec", "rayClusterConfig", "autoscalerOptions", "env", 0),
        ("spec", "rayClusterConfig", "headGroupSpec"),
        ("spec", "rayClusterConfig", "headGroupSpec", "template", "spec"),
        ("spec", "rayClusterConfig", "workerGroupSpecs", 0),
        ("spec", "rayClusterConfig", "workerGroupSpecs", 0, "template", "spec", "containers", 0),
    ],
    ids=lambda path: ".".join(map(str, path)),
)
def test_a_misspelt_field_would_be_found(path: tuple[str | int, ...]) -> None:
    service = render(values_of("trial")).ray_service
    assert not faults(service)
    assert faults(misspelt(service, *path))


def longest(one: dict[str, Any]) -> int:
    """Characters of a name: of a label where it becomes one, of a DNS name elsewhere."""
    labels = ("Service", "Job", "Pod", "StatefulSet", "Deployment", "PersistentVolumeClaim")
    return 63 if one["kind"] in labels else 253


@every
def test_names_are_within_limits_and_used_once(case: str) -> None:
    rendering = render(cases()[case])
    seen = set()
    for one in rendering.objects:
        name = one["metadata"]["name"]
        assert (one["kind"], name) not in seen
        seen.add((one["kind"], name))
        assert NAME.fullmatch(name)
        assert len(name) <= longest(one), f"{one['kind']} {name}"
    assert len(rendering.ray_service["metadata"]["name"]) <= 47


def test_the_longest_release_name_that_is_taken_keeps_every_name_within_limits() -> None:
    name = "n" * 47
    rendering = render({**cases()["production"], "fullnameOverride": name})
    assert len(rendering.objects) > 20
    for one in rendering.objects:
        assert len(one["metadata"]["name"]) <= longest(one), one["metadata"]["name"]


@every
def test_labels_are_valid_and_name_the_release(case: str) -> None:
    for one in render(cases()[case]).objects:
        labels = one["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == "dspark"
        assert labels["app.kubernetes.io/instance"] == RELEASE
        for key, value in labels.items():
            assert LABEL.fullmatch(key)
            assert LABEL_VALUE.fullmatch(value), f"{key}: {value}"
        cluster_wide = one["kind"] in ("ClusterRole", "ClusterRoleBinding", "PriorityClass")
        assert one["metadata"].get("namespace") == (None if cluster_wide else NAMESPACE)


def test_labels_of_one_kind_go_before_those_of_all() -> None:
    own = {"monitoring": {"podMonitor": {"enabled": True, "labels": {"team": "b"}}}}
    rendering = render({**cases()["trial"], **own, "commonLabels": {"team": "a"}})
    (monitor,) = rendering.of("PodMonitor")
    assert rendering.text.count("\n    team: b\n") == 1
    assert monitor["metadata"]["labels"]["team"] == "b"
    assert "team: a" not in yaml.safe_dump(monitor)
    block = rendering.text.partition("kind: PodMonitor")[2].partition("spec:")[0]
    assert block.count("team:") == 1  # twice would be refused, or the last taken


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for term in selector.get("matchExpressions", []):
        assert term["operator"] == "In", "teach this test the operator"
        if labels.get(term["key"]) not in term["values"]:
            return False
    return True


def pod_labels(rendering: Any) -> list[dict[str, str]]:
    """With what KubeRay adds."""
    labels = []
    for name, pod in rendering.pods.items():
        added = {}
        if name.startswith("group "):
            added = {"ray.io/node-type": "head" if name == "group head" else "worker"}
        labels.append({**pod["metadata"].get("labels", {}), **added})
    return labels


@every
def test_selectors_select_pods_of_the_release(case: str) -> None:
    rendering = render(cases()[case])
    labels = pod_labels(rendering)
    selectors = [(one, {"matchLabels": one["spec"]["selector"]}) for one in rendering.of("Service")]
    for kind in ("PodDisruptionBudget", "PodMonitor", "Deployment", "StatefulSet"):
        selectors += [(one, one["spec"]["selector"]) for one in rendering.of(kind)]
    for one in rendering.of("NetworkPolicy"):
        if not one["metadata"]["name"].endswith("-x"):  # the user's own
            selectors.append((one, one["spec"]["podSelector"]))
    assert selectors
    for one, selector in selectors:
        assert any(matches(selector, pod) for pod in labels), one["metadata"]["name"]


@every
def test_each_pool_has_one_budget(case: str) -> None:
    rendering = render(cases()[case])
    pools = {one.removesuffix("-spot") for one in rendering.groups} - {"head"}
    budgets = [
        one["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]
        for one in rendering.of("PodDisruptionBudget")
    ]
    assert sorted(budgets) == sorted(pools)


def test_a_budget_lets_a_pod_go_though_spare_ones_are_never_ready() -> None:
    spare = {"schedulerReplicas": 3, "pools": {"verifier": {"minPods": 6}}}
    kept = {
        one["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]: one["spec"]
        for one in render(merged(cases()["production"], spare)).of("PodDisruptionBudget")
    }
    # Two gateways and two verifiers are the fewest that run; all other pods have no proxy of Serve.
    assert {pool: spec["minAvailable"] for pool, spec in kept.items()} == {
        "gateway": 1, "verifier": 1, "draft": 0,
    }  # fmt: skip


@every
def test_routes_lead_to_the_ports_of_the_service(case: str) -> None:
    rendering = render(cases()[case])
    (service,) = [
        one for one in rendering.of("Service") if one["spec"]["ports"][0]["name"] == "http"
    ]
    ports = {one["port"] for one in service["spec"]["ports"]}
    names = {one["name"] for one in service["spec"]["ports"]}
    for route in rendering.of("HTTPRoute") + rendering.of("GRPCRoute"):
        for backend in route["spec"]["rules"][0]["backendRefs"]:
            assert backend["name"] == service["metadata"]["name"]
            assert backend["port"] in ports
    for ingress in rendering.of("Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                assert backend["name"] == service["metadata"]["name"]
                assert backend["port"].get("name") in names or backend["port"]["number"] in ports
    container = rendering.groups["gateway"]["template"]["spec"]["containers"][0]
    targets = {one["name"] for one in container["ports"]}
    assert {one["targetPort"] for one in service["spec"]["ports"]} <= targets
