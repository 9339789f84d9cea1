"""Two scheduler replicas on local Ray over a real Redis: the one that leads is killed."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from helpers.redis_server import running_redis
from ray import serve

from dspark.config import ServeConfig, build
from dspark.pb import scheduler_pb2 as pb
from dspark.rpc.lease import LeaseKeeper
from dspark.services.scheduler import app

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture
def schedulers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("RAY_worker_niceness", "0")  # no less urgent than other tests
    with running_redis(tmp_path) as redis:
        settings = {
            "scheduler_replicas": 2,
            "scheduler": {"store_url": redis.url, "leader_lease_s": 1.0},
        }
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            serve.start(proxy_location="Disabled")
            deployment = app.deployment(build(ServeConfig, settings))
            yield serve.run(deployment, name="scheduler", route_prefix=None)
        finally:
            serve.shutdown()
            ray.shutdown()


def pid_of(address: str) -> int:
    """The process that listens there."""
    port = int(address.rpartition(":")[2])
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            assert connection.pid is not None
            return connection.pid
    raise AssertionError(f"nobody listens at {address}")


async def test_replicas_follow_from_a_killed_leader_to_the_next(schedulers: Any) -> None:
    async def locate() -> str:
        address: str = await schedulers.grpc_address.remote()
        return address

    first = await locate()
    assert {await locate() for _ in range(20)} == {first}  # whichever replica is asked
    beaten = asyncio.Event()
    gateway = pb.Replica(role=pb.ROLE_GATEWAY, incarnation="g", address="g:1")
    keeper = LeaseKeeper(gateway, locate, pb.Load, lambda beat: beaten.set(), 0.2)
    keeper.start()
    async with asyncio.timeout(200):
        await beaten.wait()
        channel = keeper.channel
        os.kill(pid_of(first), signal.SIGKILL)
        while keeper.channel is None or keeper.channel is channel:
            beaten.clear()
            await beaten.wait()
        second = await locate()
    assert second != first
    await keeper.stop()
