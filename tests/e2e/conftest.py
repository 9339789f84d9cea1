"""One cluster for all end-to-end tests: four services on local Ray, the built-in model, fp32."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

import pytest

from dspark.cli.local_cluster import LocalCluster
from dspark.config import EngineConfig, GatewayConfig, ModelConfig, ServeConfig
from dspark.models.builtin import BUILTIN
from dspark.models.tokenizer import load_tokenizer

# Below what Linux gives to outgoing connections, above what Ray gives to its workers: a port that
# is free now is still free when the gateway binds it, half a minute and many processes later.
PORTS = range(21000, 29000)


def free_ports(count: int) -> list[int]:
    held: list[socket.socket] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        one = socket.socket()
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            one.close()
            continue
        held.append(one)
        if len(held) == count:
            break
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


@pytest.fixture(scope="module")  # Ray is one a process, and others want it after
def cluster() -> Iterator[LocalCluster]:
    http_port, grpc_port = free_ports(2)
    config = ServeConfig(
        # fixed blocks: a busy test machine would make the adaptive policy verify nothing, and a
        # check that nothing was drafted for shows nothing
        model=ModelConfig(target=BUILTIN, dtype="float32"),
        engine=EngineConfig(
            policy="fixed",
            max_requests=8,
            cache_tokens=8192,
            prompt_lookup=False,  # what is drafted is to come from the draft service
        ),
        gateway=GatewayConfig(http_port=http_port, grpc_port=grpc_port),
    )
    with LocalCluster(config, print) as running:
        yield running


@pytest.fixture(scope="session")
def tokenizer() -> object:
    return load_tokenizer(BUILTIN)
