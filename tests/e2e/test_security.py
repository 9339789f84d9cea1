"""The four services with all of it on: mutual TLS, a port range, a TLS listener, API keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from helpers.certificates import Authority, Secret, ServiceSecret
from helpers.ports import free_ports
from helpers.tiny import save_models
from typer.testing import CliRunner

from dspark.cli.local_cluster import LocalCluster
from dspark.cli.main import app
from dspark.config import (
    ClientTls,
    EngineConfig,
    GatewayConfig,
    ModelConfig,
    NetworkConfig,
    ServeConfig,
)
from dspark.rpc.client import GatewayTls, InferenceClient, chat_request
from dspark.rpc.explaining import describe
from dspark.rpc.transport import open_transport

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

KEY = "a-key-of-the-end-to-end-test"
NAME = "dspark.example.com"
PORTS = range(29000, 29100)
ROUNDS = 20  # of one short answer each, until one was drafted for


@dataclass(frozen=True, slots=True)
class Closed:
    """A cluster that nobody gets into without what is here."""

    cluster: LocalCluster
    services: ServiceSecret
    authority: Path  # of the public listener

    @property
    def model(self) -> str:
        return self.cluster.config.model.target

    @property
    def tls(self) -> GatewayTls:
        return GatewayTls(str(self.authority), name=NAME)


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Closed]:
    folder = tmp_path_factory.mktemp("secrets")
    inner, outer = Authority("inner"), Authority("outer")
    services = ServiceSecret(folder / "internal", inner.issue(), inner.pem)
    public = outer.issue(NAME, uses=[ExtendedKeyUsageOID.SERVER_AUTH])
    listener = Secret(folder / "grpc", crt=public.chain, key=public.key)
    Secret(folder / "keys", tester=KEY.encode())
    authority = folder / "authority.pem"
    authority.write_bytes(outer.pem)
    http_port, grpc_port = free_ports(2)
    target, drafter = save_models(folder / "models")
    config = ServeConfig(
        model=ModelConfig(str(target), str(drafter), dtype="float32", threads=1),
        engine=EngineConfig(policy="fixed", max_requests=8, cache_tokens=8192, prompt_lookup=False),
        gateway=GatewayConfig(
            http_port=http_port,
            grpc_port=grpc_port,
            tls=ClientTls(listener.path("crt"), listener.path("key")),
            api_keys_folder=str(folder / "keys"),
        ),
        network=NetworkConfig(f"{PORTS[0]}-{PORTS[-1]}", services.network.tls),
    )
    with LocalCluster(config, print) as running:
        yield Closed(running, services, authority)


def test_an_answer_is_drafted_for_behind_tls_and_a_key(closed: Closed) -> None:
    request = chat_request(
        closed.model, [("user", "Name the seasons.")], max_tokens=40, temperature=0.0
    )
    with InferenceClient(closed.cluster.grpc_address, closed.tls, KEY) as client:
        for _ in range(ROUNDS):
            *_, last = client.generate(request)
            if last.speculation.accepted_tokens:
                return
    raise AssertionError("the draft service was never heard through TLS")


def test_http_asks_for_the_key(closed: Closed) -> None:
    body = {"model": closed.model, "prompt": "One, two,", "max_tokens": 4}
    url = f"{closed.cluster.http_url}/v1/completions"
    assert httpx.post(url, json=body, timeout=60).status_code == 401
    answer = httpx.post(url, json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    assert answer.status_code == 200


def test_replicas_listen_in_the_range_and_to_services_alone(closed: Closed) -> None:
    scheduler = closed.cluster.scheduler_address
    seen = describe(scheduler, open_transport(closed.services.network))
    gateway = closed.cluster.grpc_address
    addresses = {s.replica.address for s in seen.replicas} - {gateway} | {scheduler}
    assert len(addresses) == 3, "scheduler, verifier and draft"
    for address in addresses:
        assert int(address.rpartition(":")[2]) in PORTS
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=5)


def test_operators_see_the_plans_with_the_services_certificate(closed: Closed) -> None:
    paths = [closed.services.path(name) for name in ("ca_crt", "tls_crt", "tls_key")]
    options = dict(zip(("--tls-ca", "--tls-cert", "--tls-key"), paths, strict=True))
    arguments = ["plan", "explain", "--scheduler", closed.cluster.scheduler_address, "--json"]
    told = CliRunner().invoke(
        app, [*arguments, *(word for pair in options.items() for word in pair)]
    )
    assert told.exit_code == 0, told.output
    (verifier,) = json.loads(told.stdout)
    assert verifier["verifier"].startswith("verifier-")
    half = CliRunner().invoke(app, [*arguments, "--tls-ca", paths[0]])
    assert half.exit_code == 1
    assert "go together" in half.output
