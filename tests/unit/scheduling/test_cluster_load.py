"""From nodes and pods to the cluster's load."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark.scheduling import cluster_load
from dspark.scheduling.cluster import Role
from dspark.scheduling.cluster_load import (
    AcceleratorLoad,
    ClusterInventory,
    ClusterLoad,
    Kind,
    PoolLoad,
)
from dspark.scheduling.cluster_objects import read_count

GPU = "nvidia.com/gpu"
POOL = "dspark.io/pool"


def node(
    name: str, pool: str = "a", gpus: Any = "8", ready: str = "True", cordoned: bool = False
) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name,
            "labels": {POOL: pool, "nvidia.com/gpu.product": "NVIDIA-H100"},
        },
        "spec": {"unschedulable": True} if cordoned else {},
        "status": {
            "conditions": [
                {"type": "MemoryPressure", "status": "False"},
                {"type": "Ready", "status": ready},
            ],
            "allocatable": {"cpu": "64", "memory": "1Ti", GPU: gpus},
        },
    }


def pod(
    name: str,
    *,
    on: str = "",
    gpus: Any = "1",
    phase: str = "Running",
    role: str = "verifier",
    **metadata: Any,
) -> dict[str, Any]:
    conditions = [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
            "lastTransitionTime": "2026-03-01T12:00:00Z",
        }
    ]
    return {
        "metadata": {"namespace": "n", "name": name, "labels": {"dspark.io/role": role}} | metadata,
        "spec": {"containers": [{"name": "c", "resources": {"limits": {GPU: gpus}}}]}
        | ({"nodeName": on} if on else {}),
        "status": {"phase": phase} | ({} if on else {"conditions": conditions}),
    }


def load_of(nodes: list[dict[str, Any]], pods: list[dict[str, Any]]) -> ClusterLoad:
    inventory = ClusterInventory(POOL)
    inventory.replace(Kind.NODES, nodes)
    inventory.replace(Kind.PODS, pods)
    return inventory.load()


def test_the_sums_of_a_pool() -> None:
    load = load_of(
        [
            node("n1"),
            node("n2", cordoned=True),
            node("n3", ready="Unknown"),
            node("n4", ready="False", cordoned=True),
            node("m1", pool="b", gpus="0"),
        ],
        [
            pod("p1", on="n1", gpus="3"),
            pod("p2", on="n2", gpus="8"),
            pod("p3", phase="Pending", gpus="2"),
            pod("p4", on="n1", gpus="4", phase="Succeeded"),
        ],
    )
    assert load.pools == (
        PoolLoad("", 0, 0, 0, (), (AcceleratorLoad(GPU, waiting=2),)),
        PoolLoad("a", 1, 2, 1, ("NVIDIA-H100",), (AcceleratorLoad(GPU, 32, 11, 5),)),
        PoolLoad("b", 1, 0, 0, ("NVIDIA-H100",), ()),
    )
    (waiting,) = load.pending
    assert (waiting.name, waiting.role, waiting.placed) == ("p3", "verifier", False)
    assert waiting.reason == "Unschedulable"
    assert waiting.message.startswith("0/3 nodes")
    assert waiting.since_s == 1772366400.0


def test_capacity_is_coming_while_a_pod_waits_or_starts_and_not_when_it_runs_or_leaves() -> None:
    starting = pod("s", on="n1", phase="Pending")
    starting["status"]["containerStatuses"] = [
        {"state": {"running": {}}},
        {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "back-off"}}},
    ]
    load = load_of(
        [node("n1")],
        [
            pod("w", phase="Pending"),
            starting,
            pod("running", on="n1"),
            pod("leaving", phase="Pending", deletionTimestamp="2026-03-01T12:00:00Z"),
            pod("d", phase="Pending", role="draft"),
            pod("stranger", phase="Pending", role=""),
        ],
    )
    assert Counter(p.role for p in load.pending) == {Role.VERIFIER: 2, Role.DRAFT: 1, "": 1}
    assert [p.name for p in load.pending][-1] == "stranger"
    placed = next(p for p in load.pending if p.name == "s")
    assert (placed.placed, placed.pool, placed.reason) == (True, "a", "ImagePullBackOff")


@pytest.mark.parametrize(
    ("labels", "pool"),
    [
        ({POOL: "ours", "cloud.google.com/gke-nodepool": "g"}, "ours"),
        ({"cloud.google.com/gke-nodepool": "g"}, "g"),
        ({"eks.amazonaws.com/nodegroup": "e"}, "e"),
        ({"kubernetes.azure.com/agentpool": "z"}, "z"),
        ({"karpenter.sh/nodepool": "k"}, "k"),
        ({POOL: ""}, ""),
        ({}, ""),
    ],
)
def test_a_pool_is_named_by_our_label_else_by_a_clouds(labels: dict[str, str], pool: str) -> None:
    machine = node("n")
    machine["metadata"]["labels"] = labels
    asking = pod("p", phase="Pending")
    asking["spec"]["nodeSelector"] = labels
    load = load_of([machine], [asking])
    assert [p.name for p in load.pools] == [pool]
    assert [p.pool for p in load.pending] == [pool]


def test_init_containers_run_one_by_one_and_sidecars_stay() -> None:
    def container(gpus: str, **fields: str) -> dict[str, Any]:
        return {"resources": {"requests": {GPU: gpus}}, **fields}

    heavy, light = pod("heavy", on="n"), pod("light", on="n")
    heavy["spec"]["initContainers"] = [container("1", restartPolicy="Always"), container("5")]
    heavy["spec"]["containers"] = [container("2"), container("1")]
    light["spec"]["initContainers"] = [container("2"), container("1", restartPolicy="Always")]
    light["spec"]["containers"] = [container("2"), container("1")]
    for item, needs in ((heavy, 6), (light, 4)):
        (pool,) = load_of([node("n")], [item]).pools
        assert pool.accelerators == (AcceleratorLoad(GPU, 8, needs, 8 - needs),)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8", 8), (8, 8), ("+2", 2), ("0", 0), ("500m", 1), ("1500m", 2), ("1k", 1000),
        ("1Ki", 1024), ("1Gi", 2**30), ("2e2", 200), ("1E1", 10), (".5", 1), ("1.", 1), ("3u", 1),
        ("", None), ("eight", None), ("-1", None), ("1 ", None), ("1kk", None), ("0x8", None),
        ("1E", None), ("1e99", None), ("1e999999999", None), ("9" * 200, None), ("NaN", None),
        ("٣", None), (None, None), (1.5, None), ([8], None), ("1\n", None),
    ],
)  # fmt: skip
def test_quantities(text: object, count: int | None) -> None:
    assert read_count(text) == count


def test_rubbish_counts_as_nothing_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    inventory = ClusterInventory(POOL)
    with caplog.at_level(logging.WARNING):
        inventory.put(Kind.NODES, node("n1", gpus="many"))
        inventory.put(Kind.NODES, node("n2", gpus="lots"))
        inventory.put(Kind.PODS, pod("p", on="n1", gpus="some"))
    assert ["many" in record.getMessage() for record in caplog.records] == [True]
    load = inventory.load()
    assert load.refused_quantities == 3
    (pool,) = load.pools
    assert (pool.ready, pool.accelerators) == (2, ())
    inventory.put(Kind.NODES, node("n1"))
    assert inventory.load().refused_quantities == 2


def test_a_list_that_breaks_off_leaves_what_was_known() -> None:
    inventory = ClusterInventory(POOL)
    inventory.replace(Kind.NODES, [node("n1")])
    before = inventory.load()

    def broken() -> Any:
        yield node("n2")
        raise ConnectionError

    with pytest.raises(ConnectionError):
        inventory.replace(Kind.NODES, broken())
    assert inventory.load() == before


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_load, "MAX_OBJECTS", 2)
    inventory = ClusterInventory(POOL)
    inventory.replace(Kind.NODES, [node("n1"), node("n2")])
    with pytest.raises(ValueError, match="narrow the namespace"):
        inventory.put(Kind.NODES, node("n3"))
    inventory.put(Kind.NODES, node("n2", ready="False"))  # a known one may still change
    assert inventory.load().pools[0].not_ready == 1
    inventory.replace(Kind.PODS, [pod(f"p{i}", gpus="0") for i in range(9)])  # none to keep


NAMES = st.sampled_from(["x", "y", "z"])
NODES = st.builds(
    node,
    NAMES,
    pool=st.sampled_from(["a", "b", ""]),
    gpus=st.sampled_from(["0", "4", "8", "rubbish"]),
    ready=st.sampled_from(["True", "False"]),
    cordoned=st.booleans(),
)
PODS = st.builds(
    pod,
    NAMES,
    on=st.sampled_from(["", "x", "y", "gone"]),
    gpus=st.sampled_from(["0", "1", "2", "rubbish"]),
    phase=st.sampled_from(["Pending", "Running", "Succeeded"]),
    role=st.sampled_from(["verifier", "draft", ""]),
)
EVENTS = st.lists(
    st.tuples(st.just(Kind.NODES), st.booleans(), NODES)
    | st.tuples(st.just(Kind.PODS), st.booleans(), PODS),
    max_size=20,
)


@given(EVENTS, st.randoms(use_true_random=False))
def test_only_the_last_word_on_each_object_counts(
    events: list[tuple[Kind, bool, dict[str, Any]]], random: Any
) -> None:
    """Any history that ends in the same objects gives the same load, also a bare list of them."""
    inventory = ClusterInventory(POOL)
    last: dict[tuple[Kind, str], tuple[bool, dict[str, Any]]] = {}
    for kind, gone, raw in events:
        (inventory.drop if gone else inventory.put)(kind, raw)
        inventory.load()  # what is summed up in between is not kept
        last[kind, raw["metadata"]["name"]] = (gone, raw)
    shuffled = list(last.items())
    random.shuffle(shuffled)
    other = ClusterInventory(POOL)
    for (kind, _), (gone, raw) in shuffled:
        (other.drop if gone else other.put)(kind, raw)
    assert inventory.load() == other.load()
    alive = {
        wanted: [raw for (kind, _), (gone, raw) in shuffled if kind is wanted and not gone]
        for wanted in Kind
    }
    assert inventory.load() == load_of(alive[Kind.NODES], alive[Kind.PODS])


@given(EVENTS)
def test_sums_add_up(events: list[tuple[Kind, bool, dict[str, Any]]]) -> None:
    nodes = {r["metadata"]["name"]: r for k, _, r in events if k is Kind.NODES}
    pods = {r["metadata"]["name"]: r for k, _, r in events if k is Kind.PODS}
    load = load_of(list(nodes.values()), list(pods.values()))
    assert sum(p.ready + p.not_ready + p.cordoned for p in load.pools) == len(nodes)
    for pool in load.pools:
        for part in pool.accelerators:
            assert 0 <= part.free <= part.allocatable


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "metadata", "spec", "status", "labels", "name", "containers", "resources",
                    "limits", "conditions", "type", "allocatable", "phase", "nodeName", "state",
                    "containerStatuses", "lastTransitionTime", "waiting", "reason", GPU, POOL,
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)  # fmt: skip


@given(
    st.sampled_from(list(Kind)),
    st.dictionaries(st.sampled_from(["metadata", "spec", "status"]), JSON),
    st.booleans(),
)
def test_no_object_can_break_the_view(kind: Kind, raw: dict[str, Any], named: bool) -> None:
    inventory = ClusterInventory(POOL)
    if named:
        raw["metadata"] = {"name": "x", "labels": raw.get("metadata")}
    inventory.put(kind, raw)
    inventory.load()
    inventory.drop(kind, raw)
    assert inventory.load() == ClusterLoad()


def test_texts_are_cut_and_can_be_sent_on() -> None:
    item = pod("p", phase="Pending", role="\ud800" + "r" * 5000)
    item["status"]["conditions"][0] |= {"message": "m" * 5000, "lastTransitionTime": "yesterday"}
    (pending,) = load_of([], [item]).pending
    assert pending.role.encode()
    assert (len(pending.role), len(pending.message), pending.since_s) == (253, 256, 0.0)
