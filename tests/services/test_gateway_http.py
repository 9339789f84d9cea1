"""The OpenAI-compatible API: formats, streams, refusals, limits, and clients that hang up."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import openai
import pytest
from helpers.fake_services import Script
from helpers.gateway import ANSWER, MODEL, Cluster, running_gateway
from helpers.tokenizer import byte_level, with_developer, without_template

from dspark.config import EngineConfig, GatewayConfig, ServeConfig, ServiceClass

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": MODEL, "prompt": "hello"}
TEXT_PART = {"type": "text", "text": "x"}
CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with running_gateway() as running:
        yield running


async def assert_serving(http: httpx.AsyncClient) -> None:
    answer = await http.post(TEXT_PATH, json=TEXT)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == ANSWER


def steps_of(cluster: Cluster) -> int:
    return math.ceil(len(cluster.answer_ids) / 3)


def events_of(body: str) -> list[Any]:
    assert body.endswith("\n\n")
    lines = body.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    datas = [line.removeprefix("data: ") for line in lines]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


# -- answers ---------------------------------------------------------------------------------------


async def test_a_chat_completion(cluster: Cluster) -> None:
    async with cluster.http() as http:
        body = (await http.post(CHAT_PATH, json=CHAT)).json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == MODEL
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER}
    assert choice["finish_reason"] == "stop"
    (sent,) = cluster.verifier.requests
    tokens = len(cluster.answer_ids)
    assert body["usage"] == {
        "prompt_tokens": len(sent.prompt_token_ids),
        "completion_tokens": tokens,
        "total_tokens": len(sent.prompt_token_ids) + tokens,
    }
    steps = steps_of(cluster)
    assert body["metrics"]["speculative_decoding"] == {
        "mean_acceptance_length": pytest.approx(tokens / steps),
        "draft_acceptance_rate": pytest.approx((tokens - steps) / (3 * steps)),
        "acceptance_histogram": [0, 0, steps, 0],
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": tokens - steps,
        "num_draft_tokens": 3 * steps,
        "num_verified_draft_tokens": tokens - steps,
        "num_steps": steps,
    }


async def test_metrics_without_drafting_claim_nothing(cluster: Cluster) -> None:
    from dspark.pb import verifier_pb2 as vp

    plain = tuple(
        vp.GenerateTokensResponse(token_ids=[token], finish_reason=2 if i == 3 else 0)
        for i, token in enumerate(cluster.answer_ids[:4])
    )
    cluster.verifier.scripts.append(Script(replies=plain))
    async with cluster.http() as http:
        body = (await http.post(TEXT_PATH, json={**TEXT, "speculate": False})).json()
    metrics = body["metrics"]["speculative_decoding"]
    assert metrics["num_steps"] == 4
    assert metrics["num_spec_steps"] == metrics["num_draft_tokens"] == 0
    assert metrics["mean_acceptance_length"] is metrics["draft_acceptance_rate"] is None
    assert metrics["acceptance_histogram"] == []
    assert not cluster.verifier.requests[0].sampling.speculate


async def test_a_text_completion_with_everything_set(cluster: Cluster) -> None:
    asked = {
        **TEXT, "prompt": ["hello"], "temperature": 0, "top_p": 0.9, "top_k": 5, "max_tokens": 4,
        "seed": 7, "stop": None, "n": 1, "user": "me", "metadata": {"a": "b"}, "logprobs": False,
        "presence_penalty": 0, "frequency_penalty": 0.0, "verify_mode": "coupled",
        "speculate": True, "stream": False,
    }  # fmt: skip
    async with cluster.http() as http:
        body = (await http.post(TEXT_PATH, json=asked)).json()
    assert body["object"] == "text_completion"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 4
    sampling = cluster.verifier.requests[0].sampling
    assert (sampling.seed, sampling.top_k, sampling.mode, sampling.max_tokens) == (7, 5, 2, 4)


@pytest.mark.parametrize("stop", ["brown fox", ["zzz", "brown fox"]])
async def test_stop_strings(cluster: Cluster, stop: Any) -> None:
    cluster.verifier.scripts.append(Script(hold_at=steps_of(cluster) - 1))
    async with cluster.http() as http:
        body = (await http.post(CHAT_PATH, json={**CHAT, "stop": stop})).json()
    assert body["choices"][0]["message"]["content"] == "The quick "
    assert body["choices"][0]["finish_reason"] == "stop"
    await asyncio.wait_for(cluster.verifier.cancelled.wait(), 10)


async def test_text_parts_are_joined_by_a_line_break(cluster: Cluster) -> None:
    parts = [{"type": "text", "text": "one two"}, {"type": "text", "text": "three"}]
    turns = [{"role": "system", "content": parts[:1]}, {"role": "user", "content": parts}]
    plain = [
        {"role": "system", "content": "one two"},
        {"role": "user", "content": "one two\nthree"},
    ]
    async with cluster.http() as http:
        for messages in (turns, plain):
            answer = await http.post(CHAT_PATH, json={**CHAT, "messages": messages})
            assert answer.status_code == 200, answer.text
    by_parts, by_text = (sent.prompt_token_ids for sent in cluster.verifier.requests)
    assert by_parts == by_text


@pytest.mark.parametrize("knows", [False, True])
async def test_a_developer_is_the_system_where_the_template_knows_none(knows: bool) -> None:
    tokenizer = with_developer() if knows else byte_level()
    async with running_gateway(tokenizer=tokenizer) as cluster, cluster.http() as http:
        messages = [{"role": "developer", "content": "be brief"}, *CHAT["messages"]]
        answer = await http.post(CHAT_PATH, json={**CHAT, "messages": messages})
        assert answer.status_code == 200, answer.text
    prompt = tokenizer.decode(cluster.verifier.requests[0].prompt_token_ids)
    assert ("developer\nbe brief" if knows else "system\nbe brief") in prompt


@pytest.mark.parametrize(
    ("path", "neutral"),
    [
        *[
            (CHAT_PATH, neutral)
            for neutral in (
                {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
                {"tool_choice": "auto", "parallel_tool_calls": False},
                {"functions": [], "function_call": "none"},
                {"function_call": "auto", "response_format": {"type": "text"}},
                {"modalities": ["text"], "store": False, "logit_bias": {}, "top_logprobs": 0},
                {"stream_options": None, "tools": None, "response_format": None, "store": None},
                {"stream_options": {"include_usage": False, "include_obfuscation": False}},
                {"messages": [
                    *CHAT["messages"],
                    {"role": "assistant", "content": "so", "tool_calls": [], "annotations": []},
                    *CHAT["messages"],
                ]},
            )
        ],
        (TEXT_PATH, {"echo": False, "best_of": 1, "suffix": "", "logit_bias": {}}),
    ],
)  # fmt: skip
async def test_what_asks_for_nothing_is_accepted(
    cluster: Cluster, path: str, neutral: dict[str, Any]
) -> None:
    asked = CHAT if path == CHAT_PATH else TEXT
    async with cluster.http() as http:
        answer = await http.post(path, json={**asked, **neutral})
    assert answer.status_code == 200, answer.text


async def test_the_newer_name_of_max_tokens_wins(cluster: Cluster) -> None:
    async with cluster.http() as http:
        await http.post(CHAT_PATH, json={**CHAT, "max_tokens": 9, "max_completion_tokens": 2})
    assert cluster.verifier.requests[0].sampling.max_tokens == 2


# -- streams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("include_usage", [False, True])
async def test_the_order_of_a_chat_stream(cluster: Cluster, include_usage: bool) -> None:
    asked = {**CHAT, "stream": True, "stream_options": {"include_usage": include_usage}}
    async with cluster.serving() as url, httpx.AsyncClient(base_url=url) as http:
        answer = await http.post(CHAT_PATH, json=asked)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events_of(answer.text)
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    if include_usage:
        usage = chunks.pop()
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == len(cluster.answer_ids)
        assert usage["metrics"]["speculative_decoding"]["num_spec_steps"] == steps_of(cluster)
    assert all(
        chunk.get("usage", "none") == (None if include_usage else "none") for chunk in chunks
    )
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1]["delta"] == {}
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["stop"]
    deltas = [c["delta"]["content"] for c in choices[1:-1]]
    assert all(deltas)
    assert "".join(deltas) == ANSWER


async def test_a_text_stream(cluster: Cluster) -> None:
    async with cluster.serving() as url, httpx.AsyncClient(base_url=url) as http:
        answer = await http.post(TEXT_PATH, json={**TEXT, "stream": True})
    *chunks, done = events_of(answer.text)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == ANSWER
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_an_error_behind_the_headers_is_an_event(cluster: Cluster) -> None:
    cluster.verifier.scripts.append(
        Script(fail_at=2, code=grpc.StatusCode.FAILED_PRECONDITION, details="broken contract")
    )
    async with cluster.serving() as url, httpx.AsyncClient(base_url=url) as http:
        answer = await http.post(CHAT_PATH, json={**CHAT, "stream": True})
        assert answer.status_code == 200
        *_, last = events_of(answer.text)
        assert last["error"]["message"] == "broken contract"
        assert last["error"]["code"] == "protocol_error"
        await assert_serving(http)


async def test_an_error_before_the_first_token_has_a_status(cluster: Cluster) -> None:
    cluster.scheduler.refusals.append((grpc.StatusCode.RESOURCE_EXHAUSTED, "all are full"))
    async with cluster.serving() as url, httpx.AsyncClient(base_url=url) as http:
        answer = await http.post(CHAT_PATH, json={**CHAT, "stream": True})
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "overloaded"
        await assert_serving(http)


async def test_a_refusal_says_when_to_come_back(cluster: Cluster) -> None:
    wait = (("dspark-retry-after-s", "16.2"),)
    full = grpc.StatusCode.RESOURCE_EXHAUSTED
    late = (("dspark-code", "queue_timeout"), ("dspark-retry-after-s", "nonsense"))
    cluster.scheduler.refusals.append((full, "all are full", wait))
    cluster.verifier.scripts.append(Script(fail_at=0, code=full, trailing=late))
    async with cluster.http() as http:
        for retry_after, code in (("17", "overloaded"), ("1", "queue_timeout")):
            answer = await http.post(TEXT_PATH, json=TEXT)
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == retry_after
            assert answer.json()["error"]["code"] == code
        await assert_serving(http)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("hold_at", [0, 1])
async def test_hanging_up_frees_everything(cluster: Cluster, stream: bool, hold_at: int) -> None:
    cluster.verifier.scripts.append(Script(hold_at=hold_at))
    async with cluster.serving() as url, httpx.AsyncClient(base_url=url) as http:
        posting = asyncio.create_task(http.post(CHAT_PATH, json={**CHAT, "stream": stream}))
        await asyncio.wait_for(cluster.verifier.held.wait(), 10)
        posting.cancel()
        await asyncio.wait_for(cluster.verifier.cancelled.wait(), 10)
        await assert_serving(http)
        assert cluster.service.generator.in_flight == 0


async def test_a_stream_goes_over_a_failover_unbroken() -> None:
    async with running_gateway(verifiers=2) as cluster:
        cluster.verifier.scripts.append(Script(fail_at=2))
        async with cluster.serving() as url, httpx.AsyncClient(base_url=url) as http:
            answer = await http.post(TEXT_PATH, json={**TEXT, "stream": True})
        *chunks, _ = events_of(answer.text)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == ANSWER


# -- refusals --------------------------------------------------------------------------------------


def chat(**fields: Any) -> tuple[str, Any]:
    return CHAT_PATH, {**CHAT, **fields}


def text(**fields: Any) -> tuple[str, Any]:
    return TEXT_PATH, {**TEXT, **fields}


def turn(**fields: Any) -> tuple[str, Any]:
    return chat(messages=[{"role": "user", "content": "hi", **fields}])


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        (chat(colour="red"), "colour", "not supported"),
        (chat(colour="red"), "colour", "supported are"),
        (chat(tools=[{"type": "function", "function": {"name": "f"}}]), "tools", "only []"),
        (chat(tools={}), "tools", "only []"),
        (chat(tool_choice="required"), "tool_choice", "only 'none' or 'auto'"),
        (chat(functions=[{"name": "f"}]), "functions", "only []"),
        (chat(function_call={"name": "f"}), "function_call", "only 'none' or 'auto'"),
        (chat(parallel_tool_calls="x"), "parallel_tool_calls", "boolean"),
        (chat(modalities=["text", "audio"]), "modalities", "only ['text']"),
        (chat(store=True), "store", "only False"),
        (chat(store=0), "store", "only False"),
        (chat(logprobs=True), "logprobs", "only False"),
        (text(logprobs=0), "logprobs", "only False"),  # of OpenAI's, asks for one a token
        (chat(top_logprobs=3), "top_logprobs", "only 0"),
        (chat(n=2), "n", "only 1"),
        (chat(presence_penalty=0.5), "presence_penalty", "only 0"),
        (chat(frequency_penalty=-1), "frequency_penalty", "only 0"),
        (chat(response_format={"type": "json_object"}), "response_format", "only {'type': 'text'}"),
        (chat(logit_bias={"7": 1}), "logit_bias", "only {}"),
        (chat(messages=[]), "messages", "at least one turn"),
        (chat(messages="hi"), "messages", "array"),
        (turn(role="robot"), "messages[0].role", "'robot'"),
        (turn(name="bob"), "messages[0].name", "not supported"),
        (turn(content=3), "messages[0].content", "string or a list"),
        (turn(content=[]), "messages[0].content", "at least one"),
        (turn(content=["x"]), "messages[0].content", "part 0"),
        (turn(content=[{"type": "text"}]), "messages[0].content", "part 0"),
        (turn(content=[{"type": "text", "text": 3}]), "messages[0].content", "part 0"),
        (turn(content=[TEXT_PART, {"type": "image_url", "image_url": {"url": "x"}}]),
         "messages[0].content", "part 1 is of type 'image_url'"),
        (turn(content=[{**TEXT_PART, "cache_control": {}}]), "messages[0].content",
         "cache_control"),
        (turn(content=[TEXT_PART, {"type": "text", "text": "a\ud800b"}]), "messages[0].content",
         "surrogate"),
        (turn(tool_calls=[{"id": "1"}]), "messages[0].tool_calls", "only []"),
        (turn(content="a\ud800b"), "messages[0].content", "surrogate"),
        (chat(model=3), "model", "string"),
        (chat(temperature="hot"), "temperature", "hot"),
        (chat(temperature=-0.1), "temperature", "-0.1"),
        (chat(top_p=0), "top_p", "above 0"),
        (chat(top_k=-1), "top_k", "-1"),
        (chat(top_k=2**40), "top_k", "at most"),
        (chat(max_tokens=0), "max_tokens", "at least 1"),
        (chat(max_tokens=1.5), "max_tokens", "1.5"),
        (chat(max_tokens=True), "max_tokens", "True"),
        (chat(max_tokens=512), "max_tokens", "context of 512"),
        (chat(max_completion_tokens=512), "max_completion_tokens", "context of 512"),
        (chat(max_completion_tokens=512), "max_completion_tokens", "leave max_completion_tokens"),
        (chat(max_tokens=1, max_completion_tokens=0), "max_completion_tokens", "or equal to 1"),
        (chat(seed=-1), "seed", "-1"),
        (chat(seed=2**70), "seed", ""),
        (chat(stop=["a"] * 5), "stop", "at most 4"),
        (chat(stop=[1]), "stop", "string"),
        (chat(stop=""), "stop", "1 to 256"),
        (chat(stop="\udfff"), "stop", "surrogate"),
        (chat(stream="yes"), "stream", "yes"),
        (chat(stream_options={"shout": True}), "stream_options.shout", "not supported"),
        (chat(verify_mode="maybe"), "verify_mode", "rejection"),
        (chat(service_tier="gold"), "service_tier", "there is default"),
        (chat(service_tier=1), "service_tier", "string"),
        (chat(prompt="x"), "prompt", "not supported"),
        (text(prompt=[1, 2, 3]), "prompt", "token ids"),
        (text(prompt=[[1, 2]]), "prompt", "token ids"),
        (text(prompt=["a", "b"]), "prompt", "list of 2"),
        (text(prompt=""), "prompt", "empty"),
        (text(prompt="word " * 1000), "prompt", "512"),
        (text(echo=True), "echo", "only False"),
        (text(best_of=2), "best_of", "only 1"),
        (text(suffix="x"), "suffix", "only ''"),
        (text(tools=[]), "tools", "not supported"),
        (text(messages=[]), "messages", "not supported"),
        ((CHAT_PATH, {"model": MODEL}), "messages", "missing"),
        ((TEXT_PATH, {"prompt": "x"}), "model", "missing"),
        ((CHAT_PATH, []), None, ""),
    ],
)  # fmt: skip
async def test_bad_requests_are_refused_by_name(
    cluster: Cluster, asked: tuple[str, Any], param: str | None, words: str
) -> None:
    path, body = asked
    async with cluster.http() as http:
        # Escaped, since a lone surrogate has no UTF-8.
        answer = await http.post(path, content=json.dumps(body, ensure_ascii=True))
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        if param is not None and "surrogate" not in words:
            assert error["param"] == param
            assert param in error["message"]
        assert words in error["message"]
        assert not cluster.verifier.requests
        await assert_serving(http)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"model": "\xff\xfe"}', b"null", b"[" * 100_000, b'{"seed": ' + b"9" * 10_000],
    ids=["empty", "cut", "not-utf8", "null", "deep", "long-number"],
)
async def test_what_is_not_json_is_refused(cluster: Cluster, body: bytes) -> None:
    async with cluster.http() as http:
        answer = await http.post(CHAT_PATH, content=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
        await assert_serving(http)


@pytest.mark.parametrize("announced", [True, False])
async def test_an_oversized_body_is_refused_while_it_is_read(
    cluster: Cluster, announced: bool
) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 64 << 20:
            sent += 1 << 20
            yield b" " * (1 << 20)

    async with cluster.http() as http:
        content = b" " * (5 << 20) if announced else endless()
        answer = await http.post(CHAT_PATH, content=content)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
        assert sent <= 6 << 20
        await assert_serving(http)


async def test_an_oversized_body_over_a_real_server(cluster: Cluster) -> None:
    async with cluster.serving() as url, httpx.AsyncClient(base_url=url) as http:
        answer = await http.post(CHAT_PATH, content=b" " * (5 << 20))
        assert answer.status_code == 413
    async with cluster.http() as http:
        await assert_serving(http)


async def test_an_unknown_model_is_404(cluster: Cluster) -> None:
    async with cluster.http() as http:
        answer = await http.post(CHAT_PATH, json={**CHAT, "model": "gpt-9"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert answer.json()["error"]["param"] == "model"


async def test_unknown_paths_and_methods_answer_in_the_same_form(cluster: Cluster) -> None:
    async with cluster.http() as http:
        for answer, status in (
            (await http.get("/v1/nothing"), 404),
            (await http.get(CHAT_PATH), 405),
        ):
            assert answer.status_code == status
            assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_a_model_without_template_refuses_chats_only() -> None:
    async with running_gateway(tokenizer=without_template()) as cluster, cluster.http() as http:
        answer = await http.post(CHAT_PATH, json=CHAT)
        assert answer.status_code == 400
        assert "no chat template" in answer.json()["error"]["message"]
        await assert_serving(http)


async def test_too_many_requests_are_429() -> None:
    async with running_gateway(max_in_flight=1) as cluster, cluster.http() as http:
        cluster.verifier.scripts.append(Script(hold_at=0))
        first = asyncio.create_task(http.post(TEXT_PATH, json=TEXT))
        await asyncio.wait_for(cluster.verifier.held.wait(), 10)
        answer = await http.post(TEXT_PATH, json=TEXT)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        cluster.verifier.release.set()
        assert (await first).json()["choices"][0]["text"] == ANSWER
        await assert_serving(http)


async def test_bounds_and_classes_change_while_a_stream_is_under_way() -> None:
    async with running_gateway(max_in_flight=1) as cluster, cluster.http() as http:
        cluster.verifier.scripts.append(Script(hold_at=0))
        first = asyncio.create_task(http.post(TEXT_PATH, json=TEXT))
        await asyncio.wait_for(cluster.verifier.held.wait(), 10)
        gold = {**TEXT, "service_tier": "gold"}
        assert (await http.post(TEXT_PATH, json=gold)).status_code == 400
        cluster.service.reconfigure(
            ServeConfig(
                gateway=GatewayConfig(max_in_flight=2),
                engine=EngineConfig(classes={"gold": ServiceClass(weight=2.0)}),
            )
        )
        assert (await http.post(TEXT_PATH, json=gold)).status_code == 200
        cluster.service.reconfigure(ServeConfig(gateway=GatewayConfig(max_in_flight=1)))
        assert (await http.post(TEXT_PATH, json=TEXT)).status_code == 429
        cluster.verifier.release.set()
        assert (await first).json()["choices"][0]["text"] == ANSWER


async def test_an_unexpected_error_tells_nothing_and_harms_nobody(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster.http() as http:
        with monkeypatch.context() as patch:
            patch.setattr(cluster.service.generator._encoder, "encode", None)
            answer = await http.post(TEXT_PATH, json=TEXT)
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert "NoneType" not in answer.text
        await assert_serving(http)


async def test_a_client_that_leaves_while_it_sends_is_no_error_of_ours(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    async with cluster.serving() as url, httpx.AsyncClient(base_url=url) as http:

        async def half_a_body() -> AsyncIterator[bytes]:
            yield b'{"model": '
            raise ConnectionError("the client leaves")

        with pytest.raises(ConnectionError):
            await http.post(TEXT_PATH, content=half_a_body())
        await assert_serving(http)
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


async def test_a_long_prompt_does_not_block_others() -> None:
    async with running_gateway() as cluster, cluster.http() as http:
        long = asyncio.create_task(http.post(TEXT_PATH, json={**TEXT, "prompt": "ab " * 700_000}))
        for _ in range(3):
            await assert_serving(http)
        assert not long.done(), "short prompts were served while the long one was tokenised"
        assert (await long).status_code == 400


# -- models and health -----------------------------------------------------------------------------


async def test_models(cluster: Cluster) -> None:
    async with cluster.http() as http:
        (model,) = (await http.get("/v1/models")).json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == (MODEL, "model", 512)


async def test_a_verifier_that_does_not_say_what_it_takes_is_asked() -> None:
    async with running_gateway(context_tokens=0) as cluster, cluster.http() as http:
        await assert_serving(http)
        (model,) = (await http.get("/v1/models")).json()["data"]
        assert model["max_model_len"] is None
        details = "more than the context of 9: lower max_tokens"
        invalid = grpc.StatusCode.INVALID_ARGUMENT
        cluster.verifier.scripts.append(Script(fail_at=0, code=invalid, details=details))
        answer = await http.post(TEXT_PATH, json={**TEXT, "max_tokens": 100_000})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == details


async def test_health_follows_verifiers() -> None:
    nobody = running_gateway(verifiers=0, wait=False, first_wait_s=0.1)
    async with nobody as cluster, cluster.http() as http:
        answer = await http.get("/health")
        assert answer.status_code == 503
        assert "no verifier" in answer.json()["reason"]
        assert (await http.post(TEXT_PATH, json=TEXT)).status_code == 503
    async with running_gateway() as cluster, cluster.http() as http:
        assert (await http.get("/health")).json() == {"status": "ok"}


async def test_a_lost_scheduler_takes_no_gateway_out_of_service() -> None:
    async with running_gateway() as cluster, cluster.http() as http:
        await cluster.scheduler.kill()
        cluster.service.cluster._clock = lambda: math.inf  # long after the last answer
        answer = await http.get("/health")
        assert answer.status_code == 200
        assert "scheduler" in answer.json()["reason"]
        await assert_serving(http)


# -- OpenAI's own client ---------------------------------------------------------------------------


async def test_the_openai_client(cluster: Cluster) -> None:
    async with (
        cluster.serving() as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL
        for name in ("gpt-9", "org/name"):
            with pytest.raises(openai.NotFoundError) as unknown:
                await client.models.retrieve(name)
            assert unknown.value.code == "model_not_found"
        messages: Any = [{"role": "user", "content": "hi"}]
        whole = await client.chat.completions.create(model=MODEL, messages=messages, seed=1)
        assert whole.choices[0].message.content == ANSWER
        # As frameworks go on with a conversation: with all fields that the library has.
        longer = [*messages, whole.choices[0].message.model_dump(), *messages]
        assert longer[1]["refusal"] is None
        longer[0] = {"role": "user", "content": [TEXT_PART]}
        longer.insert(0, {"role": "developer", "content": "be brief"})
        again = await client.chat.completions.create(
            model=MODEL, messages=longer, logit_bias=None, tools=[], store=False,
            response_format={"type": "text"}, modalities=["text"], max_completion_tokens=99,
        )  # fmt: skip
        assert again.choices[0].message.content == ANSWER
        assert whole.model_extra is not None
        assert whole.model_extra["metrics"]["speculative_decoding"]["num_spec_steps"]
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"verify_mode": "coupled", "top_k": 3},
        )
        chunks = [chunk async for chunk in stream]
        deltas = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        assert "".join(deltas) == ANSWER
        assert chunks[-1].usage is not None
        text = await client.completions.create(model=MODEL, prompt="hello", max_tokens=3)
        assert text.choices[0].finish_reason == "length"
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="gpt-9", messages=messages)
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model=MODEL, messages=messages, n=2)
        assert bad.value.param == "n"
        cluster.verifier.scripts.append(
            Script(fail_at=2, code=grpc.StatusCode.FAILED_PRECONDITION, details="broken contract")
        )
        broken = await client.chat.completions.create(model=MODEL, messages=messages, stream=True)
        with pytest.raises(openai.APIError, match="broken contract"):
            async for _ in broken:
                pass
