"""Mutual TLS between the services: who is let in, renewal without a restart, the same tokens."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import Result
from helpers.certificates import (
    Authority,
    Issued,
    ServiceSecret,
    service_secret,
)
from helpers.draft_services import TARGET, WEIGHTS, draft_service
from helpers.fake_services import FakeVerifier, Oracle
from helpers.live_cluster import live_cluster
from helpers.tiny import Tally, run, tiny_drafter, tiny_engine, tiny_target
from typer.testing import CliRunner

from dspark.cli.main import app
from dspark.config import ModelConfig, ServeConfig
from dspark.errors import ConfigError
from dspark.pb import scheduler_pb2 as sp
from dspark.pb import scheduler_pb2_grpc, verifier_pb2, verifier_pb2_grpc
from dspark.rpc.explaining import describe, explain_steps
from dspark.rpc.lease import LeaseKeeper
from dspark.rpc.pooled_draft_link import PooledDraftLink
from dspark.rpc.server import ReplicaServer
from dspark.rpc.step_times import SharedStepTimes
from dspark.rpc.transport import PLAINTEXT, Transport
from dspark.services.draft.service import DraftService
from dspark.services.gateway.channels import ChannelCache
from dspark.services.scheduler.service import SchedulerService
from dspark.services.verifier.service import VerifierService
from dspark.types import Request, SamplingParams

OURS, THEIRS = Authority("ours"), Authority("theirs")
PATIENCE_S = 20.0
OVERRIDE = [("grpc.ssl_target_name_override", "dspark.internal")]
REQUESTS = [
    Request(str(i), tuple(range(1, 4 + i)), SamplingParams(temperature=t, max_tokens=80, seed=i))
    for i, t in enumerate((0.0, 0.0, 1.0))
]


@asynccontextmanager
async def scheduler(secret: ServiceSecret) -> AsyncIterator[str]:
    service = SchedulerService(ServeConfig(network=secret.network))
    yield await service.start("127.0.0.1")
    await service.check()
    await service.stop(0)


async def described(channel: grpc.aio.Channel) -> str:
    """ok, or how the call ended."""
    try:
        stub = scheduler_pb2_grpc.SchedulerStub(channel)
        await stub.DescribeCluster(sp.DescribeClusterRequest(), timeout=5.0)
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {error.details()}"
    return "ok"


async def describe_as(address: str, credentials: grpc.ChannelCredentials | None) -> str:
    channel = (
        grpc.aio.insecure_channel(address)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials, options=OVERRIDE)
    )
    async with channel:
        return await described(channel)


async def eventually(look: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if await look():
                return
            await asyncio.sleep(0.05)


# -- who is let in ---------------------------------------------------------------------------------


async def test_a_service_is_let_in(tmp_path: Path) -> None:
    secret = service_secret(tmp_path, OURS)
    async with scheduler(secret) as address:
        assert await describe_as(address, OURS.issue().channel_credentials(OURS)) == "ok"
        async with secret.transport().channel(address) as channel:
            assert await described(channel) == "ok"


@pytest.mark.parametrize(
    ("shown", "why"),
    [
        (None, "WRONG_VERSION_NUMBER"),
        (Issued(b"", b""), "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        (THEIRS.issue(), "unable to get local issuer certificate"),
        (OURS.issue(expires_in=-timedelta(minutes=1)), "certificate has expired"),
    ],
)
async def test_who_shows_nothing_that_counts_is_refused_and_the_log_says_why(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], shown: Issued | None, why: str
) -> None:
    credentials = None
    if shown is not None:
        credentials = (
            shown.channel_credentials(OURS)
            if shown.chain
            else grpc.ssl_channel_credentials(OURS.pem)
        )
    async with scheduler(service_secret(tmp_path, OURS)) as address:
        assert "UNAVAILABLE" in await describe_as(address, credentials)
    log = capfd.readouterr().err
    assert why in log
    assert "PRIVATE KEY" not in log


async def test_a_certificate_of_the_authority_that_is_no_services_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = OURS.issue("shop.example.com").channel_credentials(OURS)
    async with scheduler(service_secret(tmp_path, OURS)) as address:
        answer = await describe_as(address, other)
    assert answer.startswith("PERMISSION_DENIED")
    assert "dspark.internal" in answer
    (told,) = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
    assert "/dspark.v1.Scheduler/DescribeCluster" in told


async def test_a_scheduler_of_another_authority_is_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = service_secret(tmp_path / "theirs", THEIRS)
    ours = service_secret(tmp_path / "ours", OURS)
    beaten = asyncio.Event()
    async with scheduler(theirs) as address:

        async def locate() -> str:
            return address

        keeper = LeaseKeeper(
            sp.Replica(role=sp.ROLE_GATEWAY, incarnation="g", address=address),
            locate, sp.Load, lambda _: beaten.set(), 0.05,
            transport=ours.transport(),
        )  # fmt: skip
        keeper.start()

        async def told() -> bool:
            return "CERTIFICATE_VERIFY_FAILED" in caplog.text

        await eventually(told)
        await keeper.stop()
    assert not beaten.is_set()


async def test_the_health_socket_answers_nothing_else(tmp_path: Path) -> None:
    files = service_secret(tmp_path, OURS).transport().certificates
    server = ReplicaServer(certificates=files)
    scheduler_pb2_grpc.add_SchedulerServicer_to_server(
        scheduler_pb2_grpc.SchedulerServicer(), server.server
    )
    await server.start("127.0.0.1", 0, [sp.DESCRIPTOR.services_by_name["Scheduler"]])
    await server.check()
    folder = server._folder
    assert folder is not None
    assert folder.stat().st_mode & 0o077 == 0, "others may open it"
    answer = await describe_as(server._own_address, None)
    assert answer.startswith("PERMISSION_DENIED: this socket answers health checks only")
    await server.stop(0)
    assert not folder.exists()


async def test_services_that_could_not_be_believed_do_not_start(tmp_path: Path) -> None:
    expired = ServiceSecret(tmp_path, OURS.issue(expires_in=-timedelta(minutes=1)), OURS.pem)
    with pytest.raises(ConfigError, match="expired at"):
        SchedulerService(ServeConfig(network=expired.network))


@pytest.mark.parametrize("service", [DraftService, VerifierService])
def test_certificates_are_refused_before_a_model_is_loaded(tmp_path: Path, service: Any) -> None:
    async def locate() -> str:
        raise AssertionError

    expired = ServiceSecret(tmp_path, OURS.issue(expires_in=-timedelta(minutes=1)), OURS.pem)
    model = ModelConfig(target=str(tmp_path / "missing"), drafter=str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="expired at"):
        service(ServeConfig(model=model, network=expired.network), locate)


# -- renewal ---------------------------------------------------------------------------------------


async def test_a_running_server_shows_its_new_certificate(tmp_path: Path) -> None:
    secret = service_secret(tmp_path, OURS)
    old_peer, new_peer = OURS.issue(), THEIRS.issue()
    async with scheduler(secret) as address:
        open_before = grpc.aio.secure_channel(
            address, old_peer.channel_credentials(OURS), options=OVERRIDE
        )
        assert await described(open_before) == "ok"
        secret.renew(THEIRS.issue(), THEIRS.pem)
        assert await describe_as(address, new_peer.channel_credentials(THEIRS)) == "ok"
        assert "UNAVAILABLE" in await describe_as(address, old_peer.channel_credentials(OURS))
        assert await described(open_before) == "ok", "a connection that was open has ended"
        await open_before.close()


async def test_a_lease_finds_back_with_new_certificates(tmp_path: Path) -> None:
    """Both ends move to another authority; a restarted scheduler takes only the new one."""
    secret = service_secret(tmp_path, OURS)
    beaten, where = asyncio.Event(), [""]

    async def locate() -> str:
        return where[0]

    keeper = LeaseKeeper(
        sp.Replica(role=sp.ROLE_GATEWAY, incarnation="g", address="127.0.0.1:1"),
        locate, sp.Load, lambda _: beaten.set(), 0.05,
        transport=secret.transport(),
    )  # fmt: skip
    async with scheduler(secret) as where[0]:
        keeper.start()
        await asyncio.wait_for(beaten.wait(), PATIENCE_S)
    secret.renew(THEIRS.issue(), THEIRS.pem)
    async with scheduler(secret) as where[0]:
        beaten.clear()
        await asyncio.wait_for(beaten.wait(), PATIENCE_S)
    await keeper.stop()


async def test_a_stream_goes_on_and_the_next_one_uses_the_new_certificate(tmp_path: Path) -> None:
    secret = service_secret(tmp_path, OURS)
    transport = secret.transport()
    seen: list[bytes] = []

    class Noting(FakeVerifier):
        async def GenerateTokens(self, request: Any, context: Any) -> Any:  # noqa: N802
            seen.append(context.auth_context()["x509_common_name"][0])
            for token in (1, 2):
                yield verifier_pb2.GenerateTokensResponse(token_ids=[token])
                await self.release.wait()

    host = Noting(Oracle([1]), model="m")
    server = ReplicaServer(certificates=transport.certificates)
    verifier_pb2_grpc.add_VerifierServicer_to_server(host, server.server)
    names = verifier_pb2.DESCRIPTOR.services_by_name
    address = f"127.0.0.1:{await server.start('127.0.0.1', 0, [names['Verifier']])}"
    cache = ChannelCache(lambda: {address}, transport)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(server.stop, 0)
        stack.push_async_callback(cache.close)
        async with cache.use(address) as old:
            call = verifier_pb2_grpc.VerifierStub(old).GenerateTokens(
                verifier_pb2.GenerateTokensRequest()
            )
            assert (await call.read()).token_ids == [1]
            secret.renew(OURS.issue(), OURS.pem)
            async with cache.use(address) as new:
                assert new is not old
                second = verifier_pb2_grpc.VerifierStub(new).GenerateTokens(
                    verifier_pb2.GenerateTokensRequest()
                )
                assert (await second.read()).token_ids == [1]
                host.release.set()
                assert (await call.read()).token_ids == [2], "the stream of before has ended"
                assert (await second.read()).token_ids == [2]
        async with cache.use(address) as again:
            assert again is new
        with pytest.raises(grpc.aio.UsageError):  # its last user has left it
            await described(old)
    assert len(set(seen)) == 2, "the same certificate twice"


async def test_a_certificate_that_expires_in_use_keeps_streams_and_admits_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    soon = OURS.issue(expires_in=timedelta(seconds=3))
    secret = ServiceSecret(tmp_path, soon, OURS.pem)
    peer = OURS.issue().channel_credentials(OURS)
    async with scheduler(secret) as address:
        before = grpc.aio.secure_channel(address, peer, options=OVERRIDE)
        assert await described(before) == "ok"

        async def refused() -> bool:
            return "certificate has expired" in await describe_as(address, peer)

        await eventually(refused)
        assert await described(before) == "ok"
        assert "has expired, at" in caplog.text
        secret.renew(OURS.issue(), OURS.pem)
        assert await describe_as(address, peer) == "ok"
        await before.close()


def options_of(secret: ServiceSecret) -> list[str]:
    files = {"--tls-ca": "ca_crt", "--tls-cert": "tls_crt", "--tls-key": "tls_key"}
    return [word for option, name in files.items() for word in (option, secret.path(name))]


async def explained(scheduler: str, *options: str) -> Result:
    arguments = ["plan", "explain", "--scheduler", scheduler, "--json", *options]
    return await asyncio.to_thread(CliRunner().invoke, app, arguments)


# -- the whole of it -------------------------------------------------------------------------------


async def drafted(transport: Transport) -> Tally:
    async with draft_service(transport=transport) as address:
        link = PooledDraftLink("v", WEIGHTS, TARGET.vocab_size, transport=transport)
        link.set_peers({address: 1.0})

        async def up() -> bool:
            return link.connected == 1

        await eventually(up)
        engine = tiny_engine(TARGET, tiny_drafter(TARGET), link=link)
        tally = await asyncio.to_thread(run, engine, REQUESTS)
        await link.stop()
    return tally


async def test_a_draft_stream_gives_the_same_tokens_as_in_plaintext(tmp_path: Path) -> None:
    secure = await drafted(service_secret(tmp_path, OURS).transport())
    plain = await drafted(PLAINTEXT)
    assert secure.accepted > 0, "INCONCLUSIVE: nothing was accepted"
    greedy = [r.id for r in REQUESTS if r.sampling.temperature == 0.0]
    assert {name: secure.tokens[name] for name in greedy} == {
        name: plain.tokens[name] for name in greedy
    }
    assert {len(tokens) for tokens in secure.tokens.values()} == {80}


async def test_generation_and_its_tools_work_with_all_of_it_encrypted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    secret = service_secret(tmp_path, OURS)
    transport = secret.transport()
    target = tiny_target()
    async with live_cluster(secret.network) as cluster:
        verifier = await cluster.join(tiny_engine(target, tiny_drafter(target)))
        got = {r.id: await cluster.generate(r) for r in REQUESTS}
        seen = await asyncio.to_thread(describe, cluster.scheduler, transport)
        (address,) = {
            status.replica.address
            for status in seen.replicas
            if status.replica.incarnation == verifier.incarnation
        }
        steps = await asyncio.to_thread(explain_steps, address, 2, transport)

        async def locate() -> str:
            return cluster.scheduler

        shared = SharedStepTimes(locate, transport=transport)
        assert await asyncio.to_thread(shared.get, "0" * 64) is None
        told = await explained(cluster.scheduler, *options_of(secret))
        blind = await explained(cluster.scheduler)
        half = await explained(cluster.scheduler, *options_of(secret)[:2])
        await verifier.leave(0)
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)[0]["verifier"] == verifier.incarnation
    assert blind.exit_code == 1
    assert "no scheduler answers" in blind.output
    assert "go together" in half.output
    fresh = tiny_target()
    assert got == run(tiny_engine(fresh, tiny_drafter(fresh)), REQUESTS).tokens
    assert len(steps) == 2
    assert "no step times are shared" not in caplog.text
    assert "PRIVATE KEY" not in caplog.text
