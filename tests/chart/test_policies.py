"""Network policies: nothing is open by default, and every edge that the services use is named."""

from __future__ import annotations

import pytest
from helpers.chart import cases, render
from helpers.network_policies import allowed, policies_of

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
