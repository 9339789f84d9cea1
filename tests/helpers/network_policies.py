"""Which edges between a release's pods the chart's network policies open."""

from __future__ import annotations

from typing import Any

from helpers.chart import Rendering


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
