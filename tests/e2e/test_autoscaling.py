"""A step of load on local Ray: verifiers come and go, drafts go to none and come back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from helpers.ports import free_ports
from helpers.tiny import save_models
from ray import serve

from dspark.cli.local_cluster import LocalCluster
from dspark.config import (
    AutoscalingConfig,
    DraftScaling,
    EngineConfig,
    GatewayConfig,
    ModelConfig,
    ServeConfig,
    VerifierScaling,
)
from dspark.rpc.client import InferenceClient, chat_request

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

CLIENTS = 12
_PATIENCE_S = 180.0  # until a test gives up; never the time that it takes


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    target, drafter = save_models(tmp_path_factory.mktemp("tiny"))
    http_port, grpc_port = free_ports(2)
    config = ServeConfig(
        model=ModelConfig(str(target), str(drafter), dtype="float32", threads=1),
        # two at a time, so that the others wait
        engine=EngineConfig(policy="fixed", max_requests=2, cache_tokens=2048, prompt_lookup=False),
        gateway=GatewayConfig(http_port=http_port, grpc_port=grpc_port),
        autoscaling=AutoscalingConfig(
            enabled=True,
            interval_s=0.25,
            stale_after_s=5.0,
            verifier=VerifierScaling(
                max_replicas=2, queue_age_s=0.2, up_after_s=0.5, down_after_s=2.0
            ),
            draft=DraftScaling(max_replicas=1, wake_after_s=0.5, zero_after_s=2.0),
        ),
    )
    with LocalCluster(config, print) as running:
        yield running


def running(pool: str) -> int:
    deployment = serve.status().applications[pool].deployments[pool]
    return deployment.replica_states.get("RUNNING", 0)


def ask(cluster: LocalCluster, client: InferenceClient, *, speculate: bool) -> Any:
    """The last part of an answer; whatever goes wrong is raised."""
    asked = chat_request(
        cluster.config.model.target,
        [("user", "one two three")],
        max_tokens=100,
        temperature=0.0,
        speculate=speculate,
    )
    *_, last = client.generate(asked)
    return last


def ask_until(
    cluster: LocalCluster, reached: Callable[[], bool], what: str, *, speculate: bool
) -> None:
    """One request after the other, all of which succeed, until it has come to pass."""
    deadline = time.monotonic() + _PATIENCE_S
    with InferenceClient(cluster.grpc_address) as client:
        while not reached():
            assert time.monotonic() < deadline, f"it never came to {what}"
            ask(cluster, client, speculate=speculate)


def test_a_step_of_load_scales_both_pools_up_and_down_and_no_request_fails(
    cluster: LocalCluster,
) -> None:
    assert (running("verifier"), running("draft")) == (1, 0)
    over = threading.Event()

    def load() -> int:
        answers = 0
        with InferenceClient(cluster.grpc_address) as client:
            while not over.is_set():
                ask(cluster, client, speculate=True)
                answers += 1
        return answers

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(load) for _ in range(CLIENTS)]
        try:
            ask_until(cluster, lambda: running("verifier") == 2, "two verifiers", speculate=True)
            ask_until(cluster, lambda: running("draft") == 1, "a draft replica", speculate=True)
        finally:
            over.set()
        assert all(client.result(_PATIENCE_S) for client in clients)

    # little to do, and nobody who wants drafts
    ask_until(cluster, lambda: running("verifier") == 1, "one verifier", speculate=False)
    ask_until(cluster, lambda: running("draft") == 0, "no draft replica", speculate=False)

    # without drafts it goes on, and asks for them
    ask_until(cluster, lambda: running("draft") == 1, "a draft replica again", speculate=True)
    with InferenceClient(cluster.grpc_address) as client:
        deadline = time.monotonic() + _PATIENCE_S
        while not ask(cluster, client, speculate=True).speculation.drafted_tokens:
            assert time.monotonic() < deadline, "drafting did not resume"
