"""Which nodes take which pods, by the rules of Kubernetes' scheduler that doctor follows."""

from __future__ import annotations

from typing import Any

import pytest

from dspark.cli.kube_doctor.findings import Level
from dspark.cli.kube_doctor.manifests import Workload
from dspark.cli.kube_doctor.objects import expression_holds, pod_requests, quantities, selects
from dspark.cli.kube_doctor.placement import check_placement, tolerates

TAINT = {"key": "gpu", "value": "h100", "effect": "NoSchedule"}


def pool(name: str, gpus: int, count: int, **spec: Any) -> Workload:
    container = {"resources": {"limits": {"nvidia.com/gpu": str(gpus), "cpu": "1"}}}
    return Workload(name, count, count, {"containers": [container], **spec})


def node(name: str, gpus: int, **labels: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": labels},
        "status": {
            "allocatable": {"nvidia.com/gpu": str(gpus), "cpu": "64"},
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def levels(workloads: tuple[Workload, ...], *nodes: dict[str, Any]) -> dict[str, Level]:
    found = check_placement(workloads, nodes, (), from_zero=False)
    return {f.check: f.level for f in found if f.check.startswith("pods ")}


def test_pools_share_nodes_and_are_not_counted_twice() -> None:
    both = (pool("verifier", 4, 1), pool("draft", 1, 4))
    assert set(levels(both, node("a", 8)).values()) == {Level.OK}
    assert levels(both, node("a", 6)) == {"pods verifier": Level.OK, "pods draft": Level.FAILED}


def test_gpus_of_two_nodes_do_not_make_one_pod() -> None:
    assert levels((pool("verifier", 8, 1),), node("a", 4), node("b", 4)) == {
        "pods verifier": Level.FAILED
    }


def test_a_pool_that_may_grow_beyond_the_nodes_is_warned_of() -> None:
    grows = Workload("verifier", 1, 4, pool("verifier", 8, 1).spec)
    assert levels((grows,), node("a", 8)) == {"pods verifier": Level.WARNING}


@pytest.mark.parametrize(
    ("toleration", "yes"),
    [
        ({"key": "gpu", "operator": "Exists"}, True),
        ({"key": "gpu", "value": "h100"}, True),
        ({"key": "gpu", "value": "l4"}, False),
        ({"operator": "Exists"}, True),
        ({"key": "gpu", "operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "other", "operator": "Exists"}, False),
    ],
)
def test_tolerations(toleration: dict[str, str], yes: bool) -> None:
    assert tolerates({"tolerations": [toleration]}, TAINT) is yes


@pytest.mark.parametrize(
    ("operator", "values", "yes"),
    [
        ("In", ["a", "b"], True),
        ("NotIn", ["a"], False),
        ("Exists", [], True),
        ("DoesNotExist", [], False),
        ("Gt", ["3"], False),
        ("Unheard", [], False),
    ],
)
def test_expressions(operator: str, values: list[str], yes: bool) -> None:
    expression = {"key": "k", "operator": operator, "values": values}
    assert expression_holds(expression, {"k": "a"}) is yes
    assert selects({"matchExpressions": [expression]}, {"k": "a"}) is yes


def test_a_pod_asks_for_its_containers_sum_or_its_largest_first_step() -> None:
    def asks(cpu: str, **more: str) -> dict[str, Any]:
        return {"resources": {"requests": {"cpu": cpu}}, **more}

    spec = {"containers": [asks("500m"), asks("1")], "initContainers": [asks("4"), asks("2")]}
    assert pod_requests(spec) == quantities({"r": {"cpu": "4"}}, "r")
    spec["initContainers"] = [asks("3", restartPolicy="Always")]
    assert pod_requests(spec) == quantities({"r": {"cpu": "4500m"}}, "r")


def test_an_amount_that_cannot_be_read_counts_as_absent() -> None:
    assert quantities({"r": {"cpu": "many", "memory": None}}, "r") == {}
