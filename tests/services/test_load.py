"""The load driver over real sockets: our gateway, and servers that fail in every way."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from helpers.fake_services import Script
from helpers.gateway import MODEL, running_gateway

from dspark.errors import ConfigError, UnavailableError
from dspark.evaluation.latency import Sla, Turn, summarise
from dspark.evaluation.load import Limits, run_turn
from dspark.evaluation.openai_client import Endpoint, discover, parse_endpoint, try_out
from dspark.evaluation.traffic import Ask, ClosedLoop, Fixed, Load, Poisson, Workload

ROOT = Path(__file__).resolve().parents[2]
WORKLOAD = Workload(("hello",), Fixed(5))
Answering = Callable[[dict[str, Any]], Awaitable[Response]]


def text_event(text: str | None, finish: str | None = None) -> str:
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n"


def usage_event(tokens: int) -> str:
    usage = {"prompt_tokens": 3, "completion_tokens": tokens}
    return f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"


WHOLE = (": ping\n\n", text_event(""), text_event("a"), text_event("b"), text_event(None, "length"))
DONE = "data: [DONE]\n\n"


def streamed(*events: str | Exception) -> Response:
    async def send() -> AsyncIterator[str]:
        for event in events:
            if isinstance(event, Exception):
                raise event
            yield event

    return StreamingResponse(send(), media_type="text/event-stream")


@asynccontextmanager
async def server(answering: Answering) -> AsyncIterator[Endpoint]:
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": "theirs", "owned_by": "vllm"}]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answering(await request.json())

    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level=60, lifespan="off")
    running = uvicorn.Server(config)
    bound = config.bind_socket()
    serving = asyncio.create_task(running.serve([bound]))
    try:
        yield Endpoint("theirs", f"http://127.0.0.1:{bound.getsockname()[1]}/v1", "theirs")
    finally:
        running.should_exit = True
        await serving


async def drive(endpoint: Endpoint, load: Load, **limits: Any) -> Turn:
    async with httpx.AsyncClient() as http:
        asks = WORKLOAD.asks("seed")
        return await run_turn(
            http, endpoint, load, asks, Limits(failure_pause_s=0.0, **limits), "seed"
        )


# -- our gateway -----------------------------------------------------------------------------------


async def test_our_gateway_is_measured_with_its_own_counts() -> None:
    async with running_gateway() as cluster, cluster.serving() as url:
        async with httpx.AsyncClient() as http:
            endpoint = await discover(http, parse_endpoint("--endpoint", f"ours={url}/v1/"))
            endpoint = replace(endpoint, fields={"speculate": False, "temperature": 0.0})
            await try_out(http, endpoint, Ask("hi", 4))
        turn = await drive(endpoint, ClosedLoop(2), requests=6)
        sent = cluster.verifier.requests
    assert (endpoint.model, endpoint.owner) == (MODEL, "dspark")
    assert len(sent) == 7
    assert not any(request.sampling.speculate for request in sent)
    assert [r.failure for r in turn.records] == [""] * 6
    for record in turn.records:
        assert record.counted
        assert (record.output_tokens, record.prompt_tokens) == (5, len(sent[1].prompt_token_ids))
        assert len(record.event_s) == 2  # blocks of three tokens
        assert record.due_s < record.event_s[0] <= record.event_s[1]
    summary = summarise([turn], Sla())
    assert summary.tokens_per_event == 2.5
    assert summary.measured == 6
    assert summary.tokens_per_s > 0


async def test_failures_of_our_gateway_are_told_apart() -> None:
    async with running_gateway(max_in_flight=1) as cluster, cluster.serving() as url:
        endpoint = Endpoint("ours", f"{url}/v1", MODEL)
        cluster.verifier.scripts.append(Script(hold_at=1))
        held = asyncio.create_task(drive(endpoint, ClosedLoop(1), requests=1))
        await asyncio.wait_for(cluster.verifier.held.wait(), 10)
        refused = await drive(endpoint, ClosedLoop(2), requests=3)
        cluster.verifier.release.set()
        (whole,) = (await held).records
        unknown = await drive(replace(endpoint, fields={"ignore_eos": True}), ClosedLoop(1),
                              requests=1)  # fmt: skip
    assert [r.failure for r in refused.records] == ["HTTP 429"] * 3
    assert whole.failure == ""
    assert [r.failure for r in unknown.records] == ["HTTP 400"]


async def test_a_refusal_of_the_first_request_is_told_in_the_servers_words() -> None:
    async with running_gateway() as cluster, cluster.serving() as url:
        endpoint = Endpoint("ours", f"{url}/v1", MODEL, fields={"ignore_eos": True})
        async with httpx.AsyncClient() as http:
            with pytest.raises(UnavailableError, match=r"ours refuses .* HTTP 400: .*ignore_eos"):
                await try_out(http, endpoint, Ask("hi", 4))


# -- other servers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "failure", "events"),
    [
        (lambda: streamed(*WHOLE, usage_event(7), DONE), "", 2),
        (lambda: streamed(*WHOLE), "", 2),  # nobody misses [DONE]
        (lambda: streamed(text_event("a"), OSError("gone"), text_event("b")), "broken stream", 1),
        (lambda: streamed(text_event(""), OSError("gone")), "broken before text", 0),
        (lambda: streamed(text_event("a"), DONE), "ended early", 1),
        (lambda: streamed(text_event(None, "stop"), DONE), "no text", 0),
        (
            lambda: streamed(text_event("a"), 'data: {"error": {"code": "overloaded"}}\n\n'),
            "error event overloaded",
            1,
        ),
        (lambda: streamed('data: {"error": "full"}\n\n'), "error event full", 0),
        (lambda: streamed("data: {nonsense\n\n"), "malformed event", 0),
        (lambda: streamed("data: []\n\n"), "malformed event", 0),
        (lambda: JSONResponse({}, 429), "HTTP 429", 0),
        (lambda: JSONResponse({}, 503), "HTTP 503", 0),
    ],
)
async def test_every_end_of_an_answer(
    answer: Callable[[], Response], failure: str, events: int
) -> None:
    async def answering(body: dict[str, Any]) -> Response:
        return answer()

    async with server(answering) as endpoint:
        turn = await drive(endpoint, ClosedLoop(1), requests=2)
    assert [r.failure for r in turn.records] == [failure] * 2
    assert [len(r.event_s) for r in turn.records] == [events] * 2
    summary = summarise([turn], Sla())
    assert summary.failures == ({failure: 2} if failure else {})
    assert summary.measured == (0 if failure else 2)


async def test_a_server_without_usage_has_its_events_counted() -> None:
    async def answering(body: dict[str, Any]) -> Response:
        return streamed(*WHOLE, DONE)

    async with server(answering) as endpoint:
        (record,) = (await drive(endpoint, ClosedLoop(1), requests=1)).records
    assert (record.output_tokens, record.prompt_tokens, record.counted) == (2, None, False)


async def test_usage_that_comes_with_every_event_counts_once() -> None:
    async def answering(body: dict[str, Any]) -> Response:
        assert body["stream_options"] == {"include_usage": True}
        return streamed(usage_event(1), text_event("a"), usage_event(4), text_event(None, "stop"))

    async with server(answering) as endpoint:
        (record,) = (await drive(endpoint, ClosedLoop(1), requests=1)).records
    assert (record.output_tokens, record.counted, record.failure) == (4, True, "")


async def test_a_line_separator_within_a_text_ends_no_event() -> None:
    async def answering(body: dict[str, Any]) -> Response:
        return streamed(text_event("a\u2028b\x85c"), text_event(None, "stop"), DONE)

    async with server(answering) as endpoint:
        (record,) = (await drive(endpoint, ClosedLoop(1), requests=1)).records
    assert (record.failure, len(record.event_s)) == ("", 1)


async def test_a_silent_server_times_out() -> None:
    release = asyncio.Event()

    async def answering(body: dict[str, Any]) -> Response:
        await release.wait()
        return streamed(*WHOLE, DONE)

    async with server(answering) as endpoint:
        turn = await drive(endpoint, ClosedLoop(1), requests=1, timeout_s=0.5)
        release.set()
    assert [r.failure for r in turn.records] == ["timeout"]


async def test_nobody_there() -> None:
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        endpoint = Endpoint("nobody", f"http://127.0.0.1:{taken.getsockname()[1]}/v1", "m")
        turn = await drive(endpoint, ClosedLoop(1), requests=2)
        async with httpx.AsyncClient() as http:
            with pytest.raises(UnavailableError, match=r"nobody: .*/v1/models lists no model"):
                await discover(http, endpoint)
            with pytest.raises(UnavailableError, match="nobody: ConnectError"):
                await try_out(http, endpoint, Ask("hi", 1))
    assert [r.failure for r in turn.records] == ["no connection"] * 2


@pytest.mark.parametrize("text", ["http://x/v1", "=http://x/v1", "ours=x/v1", "ours"])
def test_an_endpoint_needs_a_name_and_a_url(text: str) -> None:
    with pytest.raises(ConfigError, match="--endpoint wants NAME=URL"):
        parse_endpoint("--endpoint", text)


# -- arrivals --------------------------------------------------------------------------------------


async def test_a_closed_loop_keeps_so_many_under_way_and_no_more() -> None:
    together = asyncio.Barrier(3)  # each answer waits for two more requests
    under_way, most = 0, 0

    async def answering(body: dict[str, Any]) -> Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await together.wait()
        under_way -= 1
        return streamed(*WHOLE, DONE)

    async with server(answering) as endpoint:
        turn = await asyncio.wait_for(drive(endpoint, ClosedLoop(3), requests=9), 30)
    assert most == 3
    assert len(turn.records) == 9
    assert turn.end_s >= max(r.due_s for r in turn.records)


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    everyone = asyncio.Barrier(6)

    async def answering(body: dict[str, Any]) -> Response:
        await everyone.wait()
        return streamed(*WHOLE, DONE)

    async with server(answering) as endpoint:
        turn = await asyncio.wait_for(drive(endpoint, Poisson(100.0), requests=6), 30)
    due = sorted(r.due_s for r in turn.records)
    assert len(due) == 6
    assert turn.start_s < due[0]
    assert turn.end_s > due[-1]  # when the seventh would have come
    # A request is due by the law alone: how late the client was does not show.
    again = [b - a for a, b in itertools.pairwise(due)]
    async with server(answering) as endpoint:
        turn = await asyncio.wait_for(drive(endpoint, Poisson(100.0), requests=6), 30)
    due = sorted(r.due_s for r in turn.records)
    assert again == pytest.approx([b - a for a, b in itertools.pairwise(due)])


@pytest.mark.parametrize("load", [ClosedLoop(2), Poisson(50.0)])
async def test_a_duration_ends_the_asking_and_waits_for_answers(load: Load) -> None:
    async def answering(body: dict[str, Any]) -> Response:
        return streamed(*WHOLE, DONE)

    async with server(answering) as endpoint:
        turn = await drive(endpoint, load, duration_s=0.4, warm_up_s=0.1)
    assert turn.window_s == pytest.approx(0.3)
    assert turn.records
    assert all(r.due_s < turn.end_s and not r.failure for r in turn.records)


async def test_a_turn_within_its_warm_up_is_refused() -> None:
    async def answering(body: dict[str, Any]) -> Response:
        return streamed(*WHOLE, DONE)

    async with server(answering) as endpoint:
        with pytest.raises(ConfigError, match="within the warm-up of 60 s: ask for longer"):
            await drive(endpoint, ClosedLoop(1), requests=1, warm_up_s=60.0)


# -- the script ------------------------------------------------------------------------------------


async def test_the_script_puts_two_endpoints_side_by_side(tmp_path: Path) -> None:
    output, plot = tmp_path / "serving.json", tmp_path / "serving.png"
    async with running_gateway() as cluster, cluster.serving() as url:
        process = await asyncio.create_subprocess_exec(
            sys.executable, ROOT / "benchmarks" / "serving.py",
            "--endpoint", f"off={url}/v1", "--endpoint", f"drafting={url}/v1",
            "--fields", 'off={"speculate": false}', "--rate", "50,100", "--requests", "10",
            "--warm-up", "0", "--rounds", "2", "--output-tokens", "uniform:4..8",
            "--prompt-words", "20", "--unique-prompts", "--ignore-eos", "--sla-ttft-ms", "60000",
            "--output", output, "--plot", plot,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"},
        )  # fmt: skip
        printed, said = (stream.decode() for stream in await process.communicate())
    assert process.returncode == 0, said
    assert "good: TTFT ≤ 60000 ms" in printed
    assert "off (dspark) is not known to take ignore_eos" in said
    asked = [r.sampling.speculate for r in cluster.verifier.requests]
    assert len(asked) == 2 + 2 * 2 * 2 * 10  # one each to begin with; loads, rounds, endpoints
    turns = asked[2:]
    assert turns[:40] == [False] * 10 + [True] * 10 + [False] * 10 + [True] * 10  # in turn
    result = json.loads(output.read_text())
    assert result["versions"]
    assert [(cell["load"], cell["endpoint"]) for cell in result["cells"]] == [
        ("50 req/s", "off"),
        ("50 req/s", "drafting"),
        ("100 req/s", "off"),
        ("100 req/s", "drafting"),
    ]
    assert all(cell["summary"]["measured"] == 20 for cell in result["cells"])
    assert all(not cell["summary"]["failures"] for cell in result["cells"])
    assert plot.read_bytes().startswith(b"\x89PNG")
