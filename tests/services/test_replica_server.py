"""A replica's server: its ports, and that two never share one."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from helpers.ports import free_ports

from dspark.config import NetworkConfig, ServeConfig
from dspark.errors import ConfigError
from dspark.pb import scheduler_pb2 as pb
from dspark.rpc.server import ReplicaServer, check_serving
from dspark.services.scheduler.service import SchedulerService

HOST = "127.0.0.1"
SERVICES = [pb.DESCRIPTOR.services_by_name["Scheduler"]]


@asynccontextmanager
async def listening(port: int | range) -> AsyncIterator[int]:
    server = ReplicaServer()
    yield await server.start(HOST, port, SERVICES)
    await server.stop(0)


def three_ports() -> range:
    """Three in a row that are free."""
    for first in free_ports(50):
        try:
            with socket.create_server((HOST, first + 1)), socket.create_server((HOST, first + 2)):
                return range(first, first + 3)
        except OSError:
            continue
    raise AssertionError("INCONCLUSIVE: no three ports in a row are free")


async def test_servers_take_the_first_free_port_of_a_range_and_share_none() -> None:
    ports = three_ports()
    async with AsyncExitStack() as stack:
        with socket.create_server((HOST, ports[1])):
            taken = [await stack.enter_async_context(listening(ports)) for _ in range(2)]
            assert taken == [ports[0], ports[2]]
            with pytest.raises(ConfigError, match=f"every port from {ports[0]} to {ports[2]}"):
                await ReplicaServer().start(HOST, ports, SERVICES)
        for port in taken:
            await check_serving(f"{HOST}:{port}")
        assert await stack.enter_async_context(listening(ports)) == ports[1]


async def test_a_single_port_that_is_taken_is_named() -> None:
    async with listening(0) as port:
        with pytest.raises(ConfigError, match=f"cannot listen on {HOST}:{port}: "):
            await ReplicaServer().start(HOST, port, SERVICES)


async def test_a_scheduler_listens_where_it_is_told() -> None:
    ports = three_ports()
    network = NetworkConfig(replica_ports=f"{ports[0]}-{ports[-1]}")
    service = SchedulerService(ServeConfig(network=network))
    assert await service.start(HOST) == f"{HOST}:{ports[0]}"
    await service.check()
    await service.stop(0)
