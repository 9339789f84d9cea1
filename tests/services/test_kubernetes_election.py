"""Election by a Kubernetes Lease, with the real client over real HTTP.

There is no kube-apiserver here. The server (helpers/lease_api.py) implements get, create and
replace of Leases, with the optimistic concurrency that elections rest on, and the formats that the
API server insists on. Authentication, watches and admission are not covered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.lease_api import LeaseApi, running_lease_api

from dspark.errors import ConfigError, UnavailableError
from dspark.services.scheduler.kubernetes_election import KubernetesElection
from dspark.services.scheduler.leadership import Leadership

client = pytest.importorskip("kubernetes.client", reason="needs the extra `kube`")

KEY = ("ns", "dspark-scheduler")
LEASE_S = 3.0


class World:
    """A server, a clock for all, and elections of as many schedulers as are asked for."""

    def __init__(self, api: LeaseApi, url: str) -> None:
        self.api, self.url, self.now = api, url, 0.0
        self._clients: list[Any] = []

    def election(self) -> KubernetesElection:
        settings = client.Configuration(host=self.url)
        settings.retries = False
        self._clients.append(client.ApiClient(settings))
        api = client.CoordinationV1Api(self._clients[-1])
        return KubernetesElection(*KEY, api, lambda: self.now)

    def close(self) -> None:
        for one in self._clients:
            one.rest_client.pool_manager.clear()

    @property
    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.api.leases[KEY]["spec"]
        return spec


@pytest.fixture
def world() -> Iterator[World]:
    with running_lease_api() as (api, url):
        made = World(api, url)
        yield made
        made.close()


async def test_one_holds_the_lease_until_it_is_silent_for_its_length(world: World) -> None:
    a, b = world.election(), world.election()
    first = await a.acquire("a", LEASE_S)
    assert first.holder == "a"
    assert await b.acquire("b", LEASE_S) == first
    assert world.spec["leaseDurationSeconds"] == 3
    assert world.spec["leaseTransitions"] == first.token
    world.now += 2.9
    assert await a.acquire("a", LEASE_S) == first  # renewed
    world.now += 2.9
    assert await b.acquire("b", LEASE_S) == first  # b sees the renewal now, and counts from here
    world.now += 2.9
    assert await b.acquire("b", LEASE_S) == first
    world.now += 0.2
    second = await b.acquire("b", LEASE_S)
    assert second.holder == "b"
    assert second.token > first.token
    assert await a.acquire("a", LEASE_S) == second


async def test_of_two_that_write_at_the_same_time_one_has_lost(world: World) -> None:
    elections = [world.election() for _ in range(6)]
    for round_number in range(10):
        names = [f"{round_number}/{i}" for i in range(6)]
        seen = await asyncio.gather(
            *(e.acquire(name, LEASE_S) for e, name in zip(elections, names, strict=True))
        )
        assert len(set(seen)) == 1
        assert seen[0].holder in names
        await elections[0].release(seen[0].holder)


async def test_release_lets_the_next_in_and_is_no_business_of_others(world: World) -> None:
    a, b = world.election(), world.election()
    await a.release("a")  # there is no Lease yet
    first = await a.acquire("a", LEASE_S)
    await b.release("b")
    assert await b.acquire("b", LEASE_S) == first
    await a.release("a")
    assert (await b.acquire("b", LEASE_S)).token == first.token + 1


async def test_force_takes_it_from_whoever_has_it(world: World) -> None:
    a, b = world.election(), world.election()
    first = await a.acquire("a", LEASE_S)
    second = await b.acquire("b", LEASE_S, force=True)
    assert (second.holder, second.token) == ("b", first.token + 1)
    assert await a.acquire("a", LEASE_S) == second


async def test_tokens_do_not_fall_back_when_the_lease_was_deleted(world: World) -> None:
    a = world.election()
    first = await a.acquire("a", LEASE_S, above=2_000_000_000)
    assert first.token == 2_000_000_001
    world.api.leases.clear()
    assert (await a.acquire("b", LEASE_S, above=first.token)).token == first.token + 1
    world.api.leases.clear()
    assert (await a.acquire("b", LEASE_S)).token > 200_000_000  # seconds since 2020


async def test_a_lease_made_by_hand_is_taken(world: World) -> None:
    world.api.leases[KEY] = {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": KEY[1], "namespace": KEY[0], "resourceVersion": "x"},
    }
    assert (await world.election().acquire("a", LEASE_S)).holder == "a"


async def test_an_api_server_that_fails_is_unavailable(world: World) -> None:
    a = world.election()
    await a.acquire("a", LEASE_S)
    world.api.out = True
    with pytest.raises(UnavailableError, match="503"):
        await a.acquire("a", LEASE_S)
    with pytest.raises(UnavailableError, match="503"):
        await a.release("a")
    world.api.out = False
    assert (await a.acquire("a", LEASE_S)).holder == "a"


async def test_a_leader_that_cannot_renew_stops_before_its_lease_ends(world: World) -> None:
    async def elected(token: int) -> None: ...

    leader = Leadership(world.election(), LEASE_S, sole=False, clock=lambda: world.now)
    standby = Leadership(world.election(), LEASE_S, sole=False, clock=lambda: world.now)
    await leader.start("l:1", elected)
    await standby.start("s:1", elected)
    assert leader.token is not None
    assert standby.leader == "l:1"
    world.api.answers.clear()  # it hangs: the event loop goes on
    await leader.stand()
    assert leader.token is not None
    world.now += LEASE_S * 0.81
    assert leader.token is None
    world.api.answers.set()
    while standby.token is None:  # what the leader asked for last may still be done, once
        world.now += LEASE_S
        await standby.stand()
        assert leader.token is None
    await leader.stand()
    assert (leader.token, leader.leader) == (None, "s:1")
    await leader.stop()
    await standby.stop()


def test_outside_a_pod_the_namespace_must_be_told() -> None:
    with pytest.raises(ConfigError, match="kubernetes_namespace"):
        KubernetesElection("", "dspark-scheduler", api=object())
