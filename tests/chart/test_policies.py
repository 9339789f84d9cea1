"""Network policies: nothing is open by default, and every edge that the services use is named."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.chart import Rendering, cases, render

every = pytest.mark.parametrize("case", cases())
# Who dials whom inside a release, by what the code does: (dialler, dialled, first port, last port).
EDGES = [
    *((role, "head", 6379, 6379) for role in ("gateway", "draft", "verifier")),
    *(  # raylets, agents and workers; Serve's proxy reaches replicas as a worker
        (one, other, port, port)
        for one in ("head", "gateway", "draft", "verifier")
        for other in ("head", "gateway", "draft", "verifier")
        for port in (7000, 7001, 7002, 7003, 52365, 10100, 11099)
    ),
    # LeaseKeeper, Coordinator and the shared step times dial the scheduler, in the gateway pool
    *((role, "gateway", 20000, 20099) for role in ("gateway", "draft", "verifier")),
    ("gateway", "verifier", 20000, 20099),  # the router
    ("verifier", "draft", 20000, 20099),  # the pooled draft link
]
# What must not be possible though both are pods of the release.
NEVER = [
    ("draft", "verifier", 20000),
    ("gateway", "draft", 20000),
    ("draft", "gateway", 50051),
    ("verifier", "gateway", 8000),
    ("draft", "head", 8265),
    ("verifier", "head", 8265),
    ("gateway", "gateway", 50051),
    ("draft", "verifier", 22),
]


def selects(selector: dict[str, Any], role: str) -> bool:
    labels = {
        "app.kubernetes.io/name": "dspark",
        "app.kubernetes.io/instance": "demo",
        "app.kubernetes.io/component": role,
    }
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    return all(
        labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", [])
    )


def opens(policies: list[dict[str, Any]], way: str, role: str, peer: str, port: int) -> bool:
    """Whether the policies on `role` let TCP to or from `peer`, a pod of the release."""
    ends = "to" if way == "egress" else "from"
    for policy in policies:
        spec = policy["spec"]
        if not selects(spec["podSelector"], role):
            continue
        for rule in spec.get(way, []):
            ports = [p for p in rule["ports"] if p["protocol"] == "TCP"]
            if not any(p["port"] <= port <= p.get("endPort", p["port"]) for p in ports):
                continue
            for end in rule[ends]:
                inside = "ipBlock" not in end and "namespaceSelector" not in end
                if inside and selects(end["podSelector"], peer):
                    return True
    return False


def allowed(policies: list[dict[str, Any]], one: str, other: str, port: int) -> bool:
    return opens(policies, "egress", one, other, port) and opens(
        policies, "ingress", other, one, port
    )


def policies_of(rendering: Rendering, *, clients: bool = False) -> list[dict[str, Any]]:
    found = rendering.of("NetworkPolicy")
    return [one for one in found if clients or not one["metadata"]["name"].endswith("-clients")]


@every
def test_every_pod_is_closed_by_default(case: str) -> None:
    rendering = render(cases()[case])
    policies = rendering.of("NetworkPolicy")
    if not cases()[case].get("networkPolicy", {}).get("enabled", True):
        assert not policies
        return
    (deny,) = [one for one in policies if one["metadata"]["name"].endswith("default-deny")]
    assert deny["spec"].keys() == {"podSelector", "policyTypes"}
    assert set(deny["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    for name, pod in rendering.pods.items():
        labels = pod["metadata"]["labels"]
        wanted = deny["spec"]["podSelector"]["matchLabels"]
        assert wanted.items() <= labels.items(), name


@every
def test_every_rule_names_its_ports_and_peers(case: str) -> None:
    for policy in render(cases()[case]).of("NetworkPolicy"):
        spec = policy["spec"]
        for rule in spec.get("ingress", []) + spec.get("egress", []):
            assert rule["ports"]
            assert rule.get("from") or rule.get("to")
        if not policy["metadata"]["name"].endswith(("-default-deny", "-x")):
            assert policy["metadata"]["annotations"]["dspark.io/edge"]


@pytest.mark.parametrize("case", ["trial", "l4-h100", "production"])
def test_every_edge_of_the_services_is_open(case: str) -> None:
    policies = policies_of(render(cases()[case]))
    closed = [
        (one, other, port)
        for one, other, first, last in EDGES
        for port in (first, last)
        if not allowed(policies, one, other, port)
    ]
    assert not closed


@pytest.mark.parametrize("case", ["trial", "l4-h100", "production"])
@pytest.mark.parametrize(("one", "other", "port"), NEVER)
def test_no_other_edge_is_open(case: str, one: str, other: str, port: int) -> None:
    assert not allowed(policies_of(render(cases()[case])), one, other, port)


def test_policies_follow_the_range_of_the_replicas_ports() -> None:
    values = {**cases()["trial"], "network": {"replicaPorts": "21000-21010"}}
    policies = policies_of(render(values))
    assert allowed(policies, "gateway", "verifier", 21010)
    assert not allowed(policies, "gateway", "verifier", 20000)


@every
def test_ports_that_policies_open_are_those_that_ray_is_given(case: str) -> None:
    for name, group in render(cases()[case]).groups.items():
        given = {key: int(port) for key, port in group["rayStartParams"].items() if "port" in key}
        edges = {port for one, _, first, last in EDGES for port in (first, last)}
        wanted = {given[key] for key in ("node-manager-port", "object-manager-port")}
        wanted |= {given["min-worker-port"], given["max-worker-port"]}
        assert wanted <= edges, name
