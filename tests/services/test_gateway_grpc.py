"""The public gRPC contract: what is answered, what is refused, and that the service goes on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from helpers.fake_services import Script
from helpers.gateway import ANSWER, MODEL, Cluster, running_gateway
from helpers.tokenizer import without_template

from dspark.config import ServiceClass
from dspark.pb import common_pb2
from dspark.pb import inference_pb2 as pb


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with running_gateway() as running:
        yield running


def text_request(text: str = "hello", **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"model": MODEL, "text": text, **fields})


def chat_request(*turns: tuple[str, str], **fields: Any) -> pb.GenerateRequest:
    messages = [pb.ChatMessage(role=role, content=content) for role, content in turns]
    return pb.GenerateRequest(model=MODEL, chat=pb.ChatPrompt(messages=messages), **fields)


async def generate(cluster: Cluster, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    return [part async for part in cluster.stub.Generate(request)]


async def refusal(cluster: Cluster, request: pb.GenerateRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(cluster, request)
    return caught.value


def text_of(parts: list[pb.GenerateResponse]) -> str:
    return "".join(part.text for part in parts)


async def test_a_chat_is_answered_in_parts(cluster: Cluster) -> None:
    parts = await generate(cluster, chat_request(("system", "be brief"), ("user", "hi")))
    assert text_of(parts) == ANSWER
    assert [t for part in parts for t in part.token_ids] == cluster.answer_ids
    assert len({part.id for part in parts}) == 1
    assert all("".join(s.text for s in part.spans) == part.text for part in parts)
    assert {s.drafted for part in parts for s in part.spans} == {True, False}
    *earlier, last = parts
    assert all(p.finish_reason == common_pb2.FINISH_REASON_UNSPECIFIED for p in earlier)
    assert not any(p.HasField("usage") or p.HasField("speculation") for p in earlier)
    assert last.finish_reason == common_pb2.FINISH_REASON_STOP
    (sent,) = cluster.verifier.requests
    prompt = cluster.tokenizer.decode(sent.prompt_token_ids)
    assert prompt == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert last.usage.prompt_tokens == len(sent.prompt_token_ids)
    assert last.usage.completion_tokens == len(cluster.answer_ids)
    steps = math.ceil(len(cluster.answer_ids) / 3)
    assert last.speculation.steps == steps
    assert last.speculation.drafted_tokens == 3 * steps
    assert last.speculation.accepted_tokens == len(cluster.answer_ids) - steps
    assert last.speculation.accepted_by_position[0] >= steps - 1


async def test_what_is_left_out_takes_the_defaults(cluster: Cluster) -> None:
    for _ in range(2):
        await generate(cluster, text_request())
    one, other = (request.sampling for request in cluster.verifier.requests)
    assert (one.temperature, one.top_p, one.top_k, one.max_tokens) == (1.0, 1.0, 0, 128)
    assert one.mode == common_pb2.VERIFY_MODE_REJECTION
    assert one.speculate
    assert one.seed != other.seed, "seeds must be drawn anew"


async def test_what_is_said_reaches_the_verifier(cluster: Cluster) -> None:
    request = text_request(
        temperature=0.0, top_p=0.5, top_k=7, max_tokens=5, seed=0, speculate=False,
        mode=common_pb2.VERIFY_MODE_COUPLED,
    )  # fmt: skip
    parts = await generate(cluster, request)
    (sent,) = cluster.verifier.requests
    assert (sent.sampling.temperature, sent.sampling.top_p, sent.sampling.top_k) == (0.0, 0.5, 7)
    assert (sent.sampling.max_tokens, sent.sampling.seed) == (5, 0)
    assert not sent.sampling.speculate
    assert sent.sampling.mode == common_pb2.VERIFY_MODE_COUPLED
    assert parts[-1].finish_reason == common_pb2.FINISH_REASON_LENGTH
    assert parts[-1].usage.completion_tokens == 5


async def test_a_service_class_reaches_the_verifier_or_is_refused() -> None:
    async with running_gateway(classes={"batch": ServiceClass(weight=0.1)}) as cluster:
        await generate(cluster, text_request(service_class="batch"))
        async with cluster.http() as http:
            asked = {"model": MODEL, "prompt": "x", "service_tier": "batch"}
            assert (await http.post("/v1/completions", json=asked)).status_code == 200
            await http.post("/v1/completions", json={**asked, "service_tier": "auto"})
        assert [sent.service_class for sent in cluster.verifier.requests] == ["batch", "batch", ""]
        error = await refusal(cluster, text_request(service_class="gold"))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "there is batch, default" in (error.details() or "")


async def test_the_default_length_is_cut_to_the_context() -> None:
    async with running_gateway(context_tokens=40) as cluster:
        await generate(cluster, text_request("a" * 10))
        (sent,) = cluster.verifier.requests
        assert sent.sampling.max_tokens == 40 - len(sent.prompt_token_ids)


@pytest.mark.parametrize(
    ("request_", "param", "words"),
    [
        (pb.GenerateRequest(model=MODEL), "input", "chat or text"),
        (text_request(""), "text", "empty"),
        (chat_request(), "chat.messages", "at least one turn"),
        (chat_request(("robot", "hi")), "chat.messages[0].role", "'robot'"),
        (chat_request(("user", "a"), ("system", "b")), "chat.messages", "must come first"),
        (text_request("word " * 1000), "text", "context takes 512"),
        (text_request(max_tokens=0), "max_tokens", "at least 1"),
        (text_request(max_tokens=511), "max_tokens", "ask for at most 5"),
        (text_request(max_tokens=2**32 - 1), "max_tokens", "exceed the context of 512"),
        (text_request(temperature=-1), "temperature", "-1"),
        (text_request(temperature=math.nan), "temperature", "nan"),
        (text_request(temperature=math.inf), "temperature", "inf"),
        (text_request(top_p=0), "top_p", "above 0"),
        (text_request(top_p=1.5), "top_p", "1.5"),
        (text_request(seed=2**64 - 1), "seed", "between 0"),
        (text_request(stop=["a", "b", "c", "d", "e"]), "stop", "at most 4"),
        (text_request(stop=[""]), "stop", "1 to 256"),
        (text_request(stop=["x" * 257]), "stop", "257"),
        (text_request(mode=9), "mode", "9"),
    ],
)  # fmt: skip
async def test_bad_requests_are_refused_by_name(
    cluster: Cluster, request_: pb.GenerateRequest, param: str, words: str
) -> None:
    error = await refusal(cluster, request_)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in error.details()
    assert ("dspark-param", param) in tuple(error.trailing_metadata())
    assert not cluster.verifier.requests
    assert text_of(await generate(cluster, text_request())) == ANSWER


async def test_an_unknown_model_is_not_found(cluster: Cluster) -> None:
    error = await refusal(cluster, text_request(model="gpt-9"))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "'gpt-9'" in error.details()
    assert MODEL in error.details()


@pytest.mark.parametrize("char", ["g", "é", "🎉"])
async def test_a_refusal_fits_into_a_status_whatever_it_repeats(
    cluster: Cluster, char: str
) -> None:
    for asked in (text_request(model=char * 100_000), chat_request((char * 100_000, "hi"))):
        error = await refusal(cluster, asked)
        code, words = (
            (grpc.StatusCode.NOT_FOUND, "there is no model")
            if asked.model != MODEL
            else (grpc.StatusCode.INVALID_ARGUMENT, "role must be one of")
        )
        assert error.code() is code
        assert words in error.details()


async def test_a_model_without_template_takes_text_only() -> None:
    async with running_gateway(tokenizer=without_template()) as cluster:
        error = await refusal(cluster, chat_request(("user", "hi")))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "no chat template" in error.details()
        assert text_of(await generate(cluster, text_request())) == ANSWER


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x1a\x02\xff\xfe", grpc.StatusCode.INVALID_ARGUMENT),  # text that is not UTF-8
        (b"\xff\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
        (text_request("a" * (4 << 20)).SerializeToString(), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
    ids=["invalid-utf8", "not-a-message", "oversized"],
)
async def test_broken_messages_are_refused(
    cluster: Cluster, data: bytes, code: grpc.StatusCode
) -> None:
    raw = cluster.channel.unary_stream("/dspark.v1.Inference/Generate")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in raw(data):
            pass
    assert caught.value.code() is code
    assert text_of(await generate(cluster, text_request())) == ANSWER


async def test_models_are_listed(cluster: Cluster) -> None:
    answer = await cluster.stub.ListModels(pb.ListModelsRequest())
    assert [(m.id, m.max_context_tokens) for m in answer.models] == [(MODEL, 512)]


async def test_a_stop_string_ends_text_and_verifier_call(cluster: Cluster) -> None:
    verifier = cluster.verifier
    cluster.verifier.scripts.append(_hold_near_the_end(cluster))
    parts = await generate(cluster, text_request(stop=["never", "brown fox"]))
    assert text_of(parts) == "The quick "
    assert parts[-1].finish_reason == common_pb2.FINISH_REASON_STOP
    tokens = [t for part in parts for t in part.token_ids]
    assert tokens == cluster.answer_ids[: len(tokens)]
    assert parts[-1].usage.completion_tokens == len(tokens)
    assert cluster.tokenizer.decode(tokens).endswith("fox")
    await asyncio.wait_for(verifier.cancelled.wait(), 10)


async def test_cancelling_frees_the_verifier_call(cluster: Cluster) -> None:
    cluster.verifier.scripts.append(_hold_near_the_end(cluster))
    call = cluster.stub.Generate(text_request())
    await call.read()
    await asyncio.wait_for(cluster.verifier.held.wait(), 10)
    assert cluster.service.generator.in_flight == 1
    call.cancel()
    await asyncio.wait_for(cluster.verifier.cancelled.wait(), 10)
    await cluster.service.generator.drain(10)
    assert cluster.service.generator.in_flight == 0


async def test_more_than_max_in_flight_is_refused_until_there_is_room() -> None:
    async with running_gateway(max_in_flight=1) as cluster:
        cluster.verifier.scripts.append(_hold_near_the_end(cluster))
        call = aiter(cluster.stub.Generate(text_request()))
        await anext(call)
        error = await refusal(cluster, text_request())
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert ("dspark-retry-after-s", "1") in tuple(error.trailing_metadata())
        cluster.verifier.release.set()
        rest = [part async for part in call]
        assert rest[-1].finish_reason == common_pb2.FINISH_REASON_STOP
        assert text_of(await generate(cluster, text_request())) == ANSWER


async def test_an_unexpected_error_tells_nothing_and_harms_nobody(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cluster.service.generator._encoder, "encode", None)
        error = await refusal(cluster, text_request())
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "NoneType" not in error.details()
    assert text_of(await generate(cluster, text_request())) == ANSWER


async def test_stopping_lets_streams_finish_and_takes_nothing_new(cluster: Cluster) -> None:
    cluster.verifier.scripts.append(_hold_near_the_end(cluster))
    call = aiter(cluster.stub.Generate(text_request()))
    first = await anext(call)
    stopping = asyncio.create_task(cluster.service.generator.drain(20))
    await asyncio.sleep(0)  # let it begin
    error = await refusal(cluster, text_request())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    cluster.verifier.release.set()
    assert text_of([first, *[part async for part in call]]) == ANSWER
    await stopping


async def test_who_balances_by_health_hears_of_a_stop_while_streams_go_on(cluster: Cluster) -> None:
    cluster.verifier.scripts.append(_hold_near_the_end(cluster))
    call = aiter(cluster.stub.Generate(text_request()))
    first = await anext(call)
    watched = aiter(
        health_pb2_grpc.HealthStub(cluster.channel).Watch(health_pb2.HealthCheckRequest())
    )
    assert (await anext(watched)).status == health_pb2.HealthCheckResponse.SERVING
    stopping = asyncio.create_task(cluster.service.stop(20))
    async with asyncio.timeout(10):
        assert (await anext(watched)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    cluster.verifier.release.set()
    assert text_of([first, *[part async for part in call]]) == ANSWER
    await stopping


def _hold_near_the_end(cluster: Cluster) -> Script:
    return Script(hold_at=math.ceil(len(cluster.answer_ids) / 3) - 1)
