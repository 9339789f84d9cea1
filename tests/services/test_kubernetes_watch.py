"""List-and-watch with the real client against an API that fails in every way.

The API is a local HTTP server (helpers/kubernetes_api.py): no kube-apiserver can be had here, so
what it says of itself is what these tests rest on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from helpers.kubernetes_api import (
    Api,
    ApiServer,
    Fault,
    babble,
    cut_short,
    drip,
    expire,
    fall_silent,
    hang_up,
    never_answer,
    refuse,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from kubernetes import client

from dspark.config import KubernetesConfig, ServeConfig
from dspark.pb import scheduler_pb2 as pb
from dspark.pb import scheduler_pb2_grpc
from dspark.scheduling.cluster_load import ClusterInventory, ClusterLoad, Kind
from dspark.services.scheduler import list_watch, service
from dspark.services.scheduler.kubernetes_watch import KubernetesWatch
from dspark.services.scheduler.list_watch import Waits
from dspark.services.scheduler.load_report import load_to_pb

WAITS = Waits(watch_s=60, answer_s=10, first_retry_s=0.01, longest_retry_s=0.05, refused_s=0.02)
CONFIG = KubernetesConfig(enabled="on", namespace="n")


def node(name: str, gpus: str = "8") -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": {"dspark.io/pool": "a"}},
        "status": {
            "conditions": [{"type": "Ready", "status": "True"}],
            "allocatable": {"nvidia.com/gpu": gpus},
        },
    }


def pod(name: str, namespace: str = "n", role: str = "verifier") -> dict[str, Any]:
    return {
        "metadata": {"namespace": namespace, "name": name, "labels": {"dspark.io/role": role}},
        "status": {"phase": "Pending"},
    }


@pytest.fixture
def server() -> Iterator[ApiServer]:
    server = ApiServer()
    yield server
    server.close()


@contextmanager
def watching(
    server: ApiServer, config: KubernetesConfig = CONFIG, waits: Waits = WAITS
) -> Iterator[KubernetesWatch]:
    configuration = client.Configuration(host=server.url)
    configuration.retries = False
    api_client = client.ApiClient(configuration)
    watch = KubernetesWatch(api_client, config, config.namespace, waits)
    try:
        yield watch
    finally:
        watch.stop()
        server.api.close()
        assert watch.join(10)
        api_client.rest_client.pool_manager.clear()


def expected(api: Api, namespace: str = "n") -> ClusterLoad:
    inventory = ClusterInventory(CONFIG.pool_label)
    for kind in Kind:
        inventory.replace(
            kind,
            [raw for (k, ns, _), raw in api.objects.items() if k == kind and ns in ("", namespace)],
        )
    return inventory.load()


def test_lists_in_pages_then_watches(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_watch, "_PAGE", 2)
    api = server.api
    for i in range(5):
        api.put("nodes", node(f"n{i}"))
    with watching(server) as watch:
        api.settle()
        assert watch.load() == expected(api)
        assert watch.load().pools[0].ready == 5
        lists = [a for a in api.asked if a.kind == "nodes" and not a.watch]
        assert [bool(a.query.get("continue")) for a in lists] == [False, True, True]
        api.put("nodes", node("n5"))
        api.delete("nodes", node("n0"))
        api.put("nodes", node("n1", gpus="4"))
        api.put("pods", pod("p"))
        api.settle()
        assert watch.load() == expected(api)
        assert [p.role for p in watch.load().pending] == ["verifier"]
        assert len([a for a in api.asked if a.kind == "nodes" and not a.watch]) == 3
        age = watch.age_s(Kind.PODS)
        assert age is not None
        assert age >= 0


def test_a_bookmark_moves_the_version_on(server: ApiServer) -> None:
    api = server.api
    with watching(server) as watch:
        api.settle()
        api.bookmark("nodes")
        api.settle()  # it watches from the bookmark on
        assert watch.load() == ClusterLoad()
        assert all(a.query["allowWatchBookmarks"].lower() == "true" for a in api.asked if a.watch)


@pytest.mark.parametrize(
    "fault",
    [
        hang_up,
        cut_short,
        drip,
        refuse(410),
        refuse(429, Retry_After="0"),
        refuse(500),
        refuse(503, Retry_After="Fri, 31 Dec 1999 23:59:59 GMT"),
        refuse(302, Location="http://127.0.0.1:1/"),
        babble(b"<html>a proxy's page</html>\n"),
        babble(b"[]\n"),
        babble(b"[" * 100_000 + b"\n"),
        babble(b'{"type": "ADDED"}\n'),
        babble(b'{"type": "ADDED", "object": {"metadata": {"name": "x"}}}\n'),
        babble(b'{"type": "ERROR", "object": {"code": 410, "message": "too old"}}\n'),
        babble(b'{"type": "ERROR", "object": {"code": "?"}}\n'),
        babble(b'{"type": "BOOKMARK", "object": {"metadata": null}}\n'),
        babble(b'\n \n{"type": "ADD'),
        babble(b""),
    ],
)
@pytest.mark.parametrize("watch_fails", [True, False])
def test_goes_on_after(server: ApiServer, fault: Fault, watch_fails: bool) -> None:
    api = server.api
    api.put("nodes", node("n0"))
    for _ in range(2):
        api.fail("nodes", fault, watch=watch_fails)
    with watching(server) as watch:
        api.await_asked(lambda a: a.kind == "nodes" and a.watch)
        api.put("nodes", node("n1"))
        api.put("nodes", node("n2"))
        api.delete("nodes", node("n0"))
        api.settle()
        assert watch.load() == expected(api)


def test_a_broken_connection_is_taken_up_where_it_broke(server: ApiServer) -> None:
    api = server.api
    with watching(server):
        api.settle()
        api.fail("nodes", cut_short, watch=True)
        since = len(api.asked)
        with api.changed:  # both come at once
            api.end_watches()
            api.put("nodes", node("n1"))
            first = api.version
            api.put("nodes", node("n2"))
        api.await_asked(lambda a: a.kind == "nodes" and a.version == first, since=since)
        api.settle()
        assert len([a for a in api.asked if a.kind == "nodes" and not a.watch]) == 1


def test_what_is_forgotten_is_listed_anew(server: ApiServer) -> None:
    api = server.api
    api.put("nodes", node("n0"))
    with watching(server) as watch:
        api.settle()
        api.fail("nodes", hang_up, watch=True)
        with api.changed:
            api.end_watches()
            api.delete("nodes", node("n0"))
            api.put("nodes", node("n1"))
            api.compact()
            since = len(api.asked)
        api.await_asked(lambda a: a.kind == "nodes" and not a.watch, since=since)
        api.settle()
        assert watch.load() == expected(api)


def test_a_list_whose_token_expires_begins_again(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(list_watch, "_PAGE", 1)
    api = server.api
    for i in range(3):
        api.put("nodes", node(f"n{i}"))

    api.fail("nodes", expire, watch=False)
    with watching(server) as watch:
        api.settle()
        assert watch.load() == expected(api)
        lists = [a for a in api.asked if a.kind == "nodes" and not a.watch]
        began = ["continue" not in a.query for a in lists]
        assert began == [True, False, True, False, False]


@pytest.mark.parametrize("fault", [fall_silent, never_answer])
def test_a_connection_that_died_without_a_word_is_given_up(server: ApiServer, fault: Fault) -> None:
    api = server.api
    api.fail("nodes", fault, watch=True)
    waits = Waits(watch_s=1, answer_s=0.2, first_retry_s=0.01, longest_retry_s=0.05)
    with watching(server, waits=waits) as watch:
        api.await_asked(lambda a: a.kind == "nodes" and a.watch, times=2)
        api.put("nodes", node("n1"))
        api.settle()
        assert watch.load() == expected(api)


@pytest.mark.parametrize("fault", [None, fall_silent])
def test_stops_promptly_in_the_middle_of_a_stream(server: ApiServer, fault: Fault | None) -> None:
    api = server.api
    if fault is not None:
        api.fail("pods", fault, watch=True)
    with watching(server) as watch:
        for kind in Kind:
            api.await_asked(lambda a, kind=kind: a.kind == kind and a.watch)  # type: ignore[misc]
        watch.stop()
        assert watch.join(WAITS.answer_s / 2)  # a stream would be given up in 70 s


def test_the_last_view_outlives_the_api(server: ApiServer) -> None:
    api = server.api
    api.put("nodes", node("n1"))
    with watching(server) as watch:
        api.settle()
        before = watch.load()
        for kind in ("nodes", "pods"):
            api.standing[kind] = hang_up
        since = len(api.asked)
        api.end_watches()
        api.await_asked(lambda a: a.kind == "nodes", since=since, times=4)
        assert watch.load() == before
        message = load_to_pb(watch)
        assert message.pools[0].nodes_ready == 1
        assert message.HasField("nodes_age_ms")


def test_a_refusal_is_said_once_with_what_to_grant(
    server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    api = server.api
    api.standing["nodes"] = refuse(403)
    api.put("pods", pod("p"))
    api.put("nodes", node("n1"))
    with caplog.at_level(logging.INFO), watching(server) as watch:
        api.await_asked(lambda a: a.kind == "nodes", times=4)
        api.settle("pods")
        assert [p.role for p in watch.load().pending] == ["verifier"]
        assert not load_to_pb(watch).HasField("nodes_age_ms")
        (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert "`list` and `watch` on `nodes`" in warning
        assert "refused with 403" in warning
        del api.standing["nodes"]
        api.await_asked(lambda a: a.kind == "nodes" and a.watch)
        api.put("nodes", node("n2"))
        api.settle()
        assert watch.load().pools[-1].ready == 2
        assert "tells of nodes again" in caplog.text


@pytest.mark.parametrize(
    ("namespace", "selector", "seen"),
    [("n", "", ["p", "q"]), ("*", "", ["o", "p", "q"]), ("n", "dspark.io/role=draft", ["q"])],
)
def test_pods_are_chosen_by_namespace_and_label(
    server: ApiServer, namespace: str, selector: str, seen: list[str]
) -> None:
    for raw in (pod("p"), pod("q", role="draft"), pod("o", namespace="other")):
        server.api.put("pods", raw)
    config = KubernetesConfig(namespace=namespace, pod_selector=selector)
    with watching(server, config) as watch:
        server.api.settle()
        assert sorted(p.name for p in watch.load().pending) == seen


@pytest.mark.parametrize("name", ["_MAX_LINE_BYTES", "_MAX_PAGE_BYTES"])
def test_what_is_too_long_is_not_kept(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(list_watch, name, 4096)
    api = server.api
    flood = babble(b"x" * 100_000)
    api.fail("nodes", flood, watch=name == "_MAX_LINE_BYTES")
    with watching(server) as watch:
        api.await_asked(lambda a: a.kind == "nodes" and not a.watch, times=2)
        api.put("nodes", node("n1"))
        api.settle()
        assert watch.load() == expected(api)


async def test_the_scheduler_describes_it(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.api.put("nodes", node("n1"))
    server.api.put("pods", pod("p"))
    with watching(server) as watch:
        server.api.settle()
        monkeypatch.setattr(service, "open_watch", lambda _: watch)
        scheduler = service.SchedulerService(ServeConfig())
        address = await scheduler.start("127.0.0.1")
        async with grpc.aio.insecure_channel(address) as channel:
            stub = scheduler_pb2_grpc.SchedulerStub(channel)
            seen = (await stub.DescribeCluster(pb.DescribeClusterRequest())).kubernetes
        await scheduler.stop(0)
    assert [(p.name, p.nodes_ready) for p in seen.pools] == [("", 0), ("a", 1)]
    assert seen.pools[1].accelerators[0] == pb.AcceleratorLoad(
        resource="nvidia.com/gpu", allocatable=8, free=8
    )
    assert (seen.pending_pods, seen.pending[0].role) == (1, "verifier")
    assert seen.HasField("nodes_age_ms")


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["nodes", "pods"]),
        st.sampled_from(["put", "put", "delete", "bookmark", "compact", "end"]),
        st.sampled_from(["x", "y", "z"]),
        st.sampled_from(["1", "8"]),
        st.sampled_from([None, None, hang_up, cut_short, drip, refuse(500), refuse(410)]),
        st.booleans(),
    ),
    max_size=25,
)


@settings(max_examples=30, deadline=None)
@given(CHANGES)
def test_whatever_happens_the_view_ends_up_right(changes: list[Any]) -> None:
    server = ApiServer()
    api = server.api
    try:
        with watching(server) as watch:
            for kind, change, name, gpus, fault, watch_fails in changes:
                if fault is not None:
                    api.fail(kind, fault, watch=watch_fails)
                raw = node(name, gpus) if kind == "nodes" else pod(name)
                if change in ("put", "delete"):
                    getattr(api, change)(kind, raw)
                elif change == "bookmark":
                    api.bookmark(kind)
                elif change == "compact":
                    api.compact()
                else:
                    api.end_watches()
            for queue in api.faults.values():
                queue.clear()
            api.settle()
            assert watch.load() == expected(api)
    finally:
        server.close()
