"""The public side closed: API keys over HTTP and gRPC, and TLS on the gRPC listener."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.certificates import Authority, Issued, Secret
from helpers.fake_services import Script
from helpers.gateway import ANSWER, MODEL, Cluster, running_gateway
from typer.testing import CliRunner

from dspark.cli.main import app
from dspark.config import ClientTls
from dspark.errors import ConfigError, UnauthenticatedError, UnavailableError
from dspark.pb import inference_pb2 as pb
from dspark.rpc.client import GatewayTls, InferenceClient, chat_request
from dspark.services.gateway import api_keys

ALICE, BOB = "alice-key-0123456789", "bob-key-0123456789ab"
OURS, THEIRS = Authority("ours"), Authority("theirs")
SERVER = (ExtendedKeyUsageOID.SERVER_AUTH,)
NAME = "dspark.example.com"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
command = CliRunner()


class Listener:
    """Certificate files of the public listener."""

    def __init__(self, folder: Path, client_ca: bytes | None = None) -> None:
        self._folder, self._client_ca = folder, client_ca
        self._secret = Secret(folder, **self._files(OURS.issue(NAME, uses=SERVER)))
        self.authority = folder.parent / "authority.pem"
        self.authority.write_bytes(OURS.pem)

    def renew(self, issued: Issued) -> None:
        self._secret.swap(**self._files(issued))

    def trust(self, authority: Authority) -> None:
        self.authority.write_bytes(authority.pem)

    @property
    def config(self) -> ClientTls:
        path = self._secret.path
        return ClientTls(path("crt"), path("key"), path("ca") if self._client_ca else "")

    def client(self, issued: Issued | None = None) -> GatewayTls:
        files = [str(self.authority)]
        if issued is not None:
            for name, data in (("client.crt", issued.chain), ("client.key", issued.key)):
                path = self.authority.parent / name
                path.write_bytes(data)
                files.append(str(path))
        return GatewayTls(*files, name=NAME)

    def _files(self, issued: Issued) -> dict[str, bytes]:
        files = {"crt": issued.chain, "key": issued.key}
        return files if self._client_ca is None else {**files, "ca": self._client_ca}


@pytest.fixture
def keys(tmp_path: Path) -> Secret:
    return Secret(tmp_path / "keys", alice=ALICE.encode())


@asynccontextmanager
async def keyed(keys: Secret, **gateway: Any) -> AsyncIterator[Cluster]:
    folder = str(Path(keys.path("alice")).parent)
    async with running_gateway(api_keys_folder=folder, **gateway) as cluster:
        yield cluster


def answer(port: int, tls: GatewayTls | None = None, key: str = "") -> str:
    with InferenceClient(f"127.0.0.1:{port}", tls, key) as client:
        parts = client.generate(chat_request(MODEL, [("user", "hi")]), timeout_s=20.0)
        return "".join(part.text for part in parts)


async def asked(port: int, tls: GatewayTls | None = None, key: str = "") -> str:
    return await asyncio.to_thread(answer, port, tls, key)


# -- keys over HTTP --------------------------------------------------------------------------------


async def test_http_answers_who_has_a_key(keys: Secret) -> None:
    async with keyed(keys) as cluster, cluster.http() as http:
        got = await http.post(
            "/v1/chat/completions", json=CHAT, headers={"Authorization": f"Bearer {ALICE}"}
        )
    assert got.status_code == 200
    assert got.json()["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ({}, "no API key was sent"),
        ({"Authorization": f"Bearer {BOB}"}, "not known"),
        ({"Authorization": f"Basic {ALICE}"}, "Authorization: Bearer KEY"),
    ],
)
async def test_http_refuses_who_has_none_before_the_body_is_read(
    keys: Secret, caplog: pytest.LogCaptureFixture, headers: dict[str, str], why: str
) -> None:
    async with keyed(keys) as cluster, cluster.http() as http:
        for method, path in (
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/completions"),
            ("GET", "/v1/models"),
            ("GET", "/nowhere"),
            ("GET", "/health/"),
        ):
            got = await http.request(method, path, content=b"no json", headers=headers)
            assert got.status_code == 401
            assert got.headers["WWW-Authenticate"] == "Bearer"
            error = got.json()["error"]
            assert (error["type"], error["param"], error["code"]) == (
                "invalid_request_error", None, "invalid_api_key",
            )  # fmt: skip
            assert why in error["message"]
        assert not cluster.verifier.requests
        assert (await http.get("/health")).status_code == 200
    assert "refused POST '/v1/chat/completions'" in caplog.text
    assert ALICE not in caplog.text
    assert BOB not in caplog.text


async def test_behind_a_route_prefix_health_alone_is_open_too(keys: Secret) -> None:
    async with keyed(keys) as cluster:
        transport = httpx.ASGITransport(cluster.service.http_app(), root_path="/second")
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            for path, status in (
                ("/second/health", 200),
                ("/second/v1/models", 401),
                ("/second/second/health", 401),
                ("/secondhealth", 401),
                ("/metrics", 401),
            ):
                assert (await http.get(path)).status_code == status, path


async def test_the_openai_client_streams_with_a_key_and_knows_the_refusal(keys: Secret) -> None:
    async with keyed(keys) as cluster, cluster.serving() as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=ALICE) as client:
            stream = await client.chat.completions.create(stream=True, **CHAT)  # type: ignore[call-overload]
            text = [c.choices[0].delta.content or "" async for c in stream if c.choices]
        assert "".join(text) == ANSWER
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=BOB) as client:
            with pytest.raises(openai.AuthenticationError) as refusal:
                await client.models.list()
        assert refusal.value.code == "invalid_api_key"


# -- keys over gRPC --------------------------------------------------------------------------------


async def test_grpc_answers_who_has_a_key_and_no_one_else(
    keys: Secret, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with keyed(keys) as cluster:
        assert await asked(cluster.port, key=ALICE) == ANSWER
        with pytest.raises(UnauthenticatedError, match="not known"):
            await asked(cluster.port, key=BOB)
        with pytest.raises(UnauthenticatedError, match="no API key was sent"):
            await asked(cluster.port)
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await cluster.stub.ListModels(pb.ListModelsRequest())
        assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED
        health = await health_pb2_grpc.HealthStub(cluster.channel).Check(
            health_pb2.HealthCheckRequest()
        )
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        await cluster.service.check()
        assert len(cluster.verifier.requests) == 1
    assert "refused /dspark.v1.Inference/Generate" in caplog.text
    assert ALICE not in caplog.text
    assert BOB not in caplog.text


async def test_keys_are_exchanged_while_a_stream_goes_on(
    keys: Secret, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_keys, "LOOK_EVERY_S", 0.0)
    async with keyed(keys) as cluster:
        cluster.verifier.scripts.append(Script(hold_at=1))
        before = asyncio.create_task(asked(cluster.port, key=ALICE))
        await asyncio.wait_for(cluster.verifier.held.wait(), 10)
        keys.swap(bob=BOB.encode())
        with pytest.raises(UnauthenticatedError):
            await asked(cluster.port, key=ALICE)
        assert await asked(cluster.port, key=BOB) == ANSWER
        async with cluster.http() as http:
            for key, status in ((ALICE, 401), (BOB, 200)):
                got = await http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
                assert got.status_code == status
        cluster.verifier.release.set()
        assert await before == ANSWER


async def test_a_client_that_leaves_is_noticed_behind_the_guard(keys: Secret) -> None:
    async with keyed(keys) as cluster:
        cluster.verifier.scripts.append(Script(hold_at=1))
        call = cluster.stub.Generate(
            pb.GenerateRequest(model=MODEL, chat=chat_request(MODEL, [("user", "hi")]).chat),
            metadata=(("authorization", f"Bearer {ALICE}"),),
        )
        assert (await call.read()).text
        call.cancel()
        await asyncio.wait_for(cluster.verifier.cancelled.wait(), 10)


async def test_a_gateway_without_usable_keys_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no API keys"):
        async with running_gateway(api_keys_folder=str(tmp_path)):
            pass


# -- TLS of the listener ---------------------------------------------------------------------------


async def test_the_listener_speaks_tls_alone(tmp_path: Path) -> None:
    listener = Listener(tmp_path / "tls")
    async with running_gateway(tls=listener.config) as cluster:
        assert await asked(cluster.port, listener.client()) == ANSWER
        with pytest.raises(UnavailableError):
            await asked(cluster.port)
        listener.trust(THEIRS)
        with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
            await asked(cluster.port, listener.client())
        await cluster.service.check()


async def test_the_listener_shows_a_renewed_certificate(tmp_path: Path) -> None:
    listener = Listener(tmp_path / "tls")
    async with running_gateway(tls=listener.config) as cluster:
        cluster.verifier.scripts.append(Script(hold_at=1))
        before = asyncio.create_task(asked(cluster.port, listener.client()))
        await asyncio.wait_for(cluster.verifier.held.wait(), 10)
        listener.renew(THEIRS.issue(NAME, uses=SERVER))
        listener.trust(THEIRS)
        assert await asked(cluster.port, listener.client()) == ANSWER
        cluster.verifier.release.set()
        assert await before == ANSWER


async def test_clients_show_certificates_where_an_authority_is_set(tmp_path: Path) -> None:
    listener = Listener(tmp_path / "tls", client_ca=THEIRS.pem)
    async with running_gateway(tls=listener.config) as cluster:
        assert await asked(cluster.port, listener.client(THEIRS.issue("a-client"))) == ANSWER
        for shown in (None, OURS.issue("a-client")):
            with pytest.raises(UnavailableError):
                await asked(cluster.port, listener.client(shown))
        await cluster.service.check()  # without a certificate of its own
        assert len(cluster.verifier.requests) == 1


async def test_the_command_line_speaks_tls_and_sends_its_key(keys: Secret, tmp_path: Path) -> None:
    listener = Listener(tmp_path / "tls")
    async with keyed(keys, tls=listener.config) as cluster:
        arguments = ["chat", "hi", "--max-tokens", "99", "--address", f"127.0.0.1:{cluster.port}"]
        tls = ["--tls-ca", str(listener.authority), "--tls-name", NAME]

        async def run(*more: str, **environment: str) -> Any:
            return await asyncio.to_thread(
                command.invoke, app, [*arguments, *more], env=dict(environment)
            )

        told = await run(*tls, DSPARK_API_KEY=ALICE)
        assert told.exit_code == 0, told.output
        assert ANSWER in " ".join(told.output.split())
        refused = await run(*tls, DSPARK_API_KEY=BOB)
        assert refused.exit_code == 1
        assert "not known" in refused.output
        assert BOB not in refused.output
        half = await run("--tls-name", NAME)
        assert "--tls-ca switches on" in half.output
