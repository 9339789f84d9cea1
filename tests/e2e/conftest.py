"""The cluster of most end-to-end tests: four services on local Ray, the built-in model, fp32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.ports import free_ports

from dspark.cli.local_cluster import LocalCluster
from dspark.config import EngineConfig, GatewayConfig, ModelConfig, ServeConfig
from dspark.models.builtin import BUILTIN
from dspark.models.tokenizer import load_tokenizer


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
