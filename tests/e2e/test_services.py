"""One prompt through four services: lossless, undisturbed by bad input, and by a dead drafter."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import pytest
from ray import serve
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from dspark.cli.local_cluster import LocalCluster
from dspark.cli.main import app
from dspark.errors import InvalidRequestError, ModelNotFoundError
from dspark.evaluation.losslessness import GreedyReference
from dspark.models.builtin import BUILTIN, resolve_target
from dspark.pb import common_pb2, inference_pb2, inference_pb2_grpc
from dspark.rpc.client import InferenceClient, chat_request

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PROMPTS = (
    "Name the four seasons of the year.",
    "Write a Python function that adds two numbers.",
    "A box holds 12 eggs. How many eggs are in 5 boxes?",
    "Why do leaves change colour in autumn?",
    "Write two sentences about the sea.",
    "What is the opposite of cold?",
    "List three uses of paper.",
    "Explain what a bridge is to a child.",
)
TOKENS = 40
_RECOVERY_S = 120.0


@pytest.fixture(scope="module")
def reference() -> GreedyReference:
    model = AutoModelForCausalLM.from_pretrained(resolve_target(BUILTIN), dtype="float32")
    eos = model.generation_config.eos_token_id
    return GreedyReference(model, (eos,))


def ask(
    client: InferenceClient, prompt: str, begun: threading.Event | None = None, **settings: Any
) -> tuple[list[int], Any]:
    settings = {"max_tokens": TOKENS, "temperature": 0.0, **settings}
    token_ids: list[int] = []
    for part in client.generate(chat_request(BUILTIN, [("user", prompt)], **settings)):
        token_ids += part.token_ids
        if begun is not None:
            begun.set()
    return token_ids, part


def ask_all(cluster: LocalCluster, **settings: Any) -> list[tuple[list[int], Any]]:
    with InferenceClient(cluster.grpc_address) as client, ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda prompt: ask(client, prompt, **settings), PROMPTS))


def assert_lossless(
    answers: list[tuple[list[int], Any]], reference: GreedyReference, tokenizer: Any
) -> None:
    for prompt, (token_ids, _) in zip(PROMPTS, answers, strict=True):
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )
        prompt = encoded["input_ids"]
        comparison = reference.compare(prompt, token_ids, reference.tokens(prompt, TOKENS))
        assert comparison.lossless, (prompt, comparison)


def test_greedy_answers_are_the_targets_own(
    cluster: LocalCluster, reference: GreedyReference, tokenizer: Any
) -> None:
    answers = ask_all(cluster)
    drafted = sum(last.speculation.drafted_tokens for _, last in answers)
    accepted = sum(last.speculation.accepted_tokens for _, last in answers)
    assert drafted > 0, "INCONCLUSIVE: nothing was drafted"
    assert accepted > 0, "INCONCLUSIVE: nothing was accepted"
    assert_lossless(answers, reference, tokenizer)


def test_services_are_as_urgent_as_who_started_them(cluster: LocalCluster) -> None:
    pid = serve.get_deployment_handle("draft", "draft").pid.remote().result(timeout_s=30)
    assert os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0)


def test_steps_are_explained(cluster: LocalCluster) -> None:
    with InferenceClient(cluster.grpc_address) as client:
        ask(client, PROMPTS[0])
    command = ["plan", "explain", "--scheduler", cluster.scheduler_address, "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    (told,) = json.loads(result.stdout)
    assert told["steps"][0]["policy"] == "fixed"
    assert told["steps"][0]["plan_epoch"] > 0


def test_coupled_answers_do_not_depend_on_speculation(cluster: LocalCluster) -> None:
    settings = {"temperature": 0.9, "seed": 7, "mode": common_pb2.VERIFY_MODE_COUPLED}
    with InferenceClient(cluster.grpc_address) as client:
        with_drafts, last = ask(client, PROMPTS[3], speculate=True, **settings)
        without, _ = ask(client, PROMPTS[3], speculate=False, **settings)
    assert last.speculation.drafted_tokens > 0, "INCONCLUSIVE: nothing was drafted"
    assert with_drafts == without


def test_http_streams_the_same_answer(cluster: LocalCluster, tokenizer: Any) -> None:
    with InferenceClient(cluster.grpc_address) as client:
        token_ids, _ = ask(client, PROMPTS[0])
    body = {
        "model": BUILTIN,
        "messages": [{"role": "user", "content": PROMPTS[0]}],
        "temperature": 0,
        "max_tokens": TOKENS,
    }
    answer = httpx.post(f"{cluster.http_url}/v1/chat/completions", json=body, timeout=60).json()
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert answer["choices"][0]["message"]["content"] == text


def test_bad_input_is_refused_and_the_service_goes_on(cluster: LocalCluster) -> None:
    url = f"{cluster.http_url}/v1/chat/completions"
    good = {"model": BUILTIN, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    bad = [
        ({**good, "messages": []}, 400, "messages"),
        ({**good, "model": "no-such-model"}, 404, "no-such-model"),
        ({**good, "messages": [{"role": "user", "content": "word " * 9000}]}, 400, "context"),
        ({**good, "max_tokens": -1}, 400, "max_tokens"),
        ({**good, "max_tokens": 10**9}, 400, "max_tokens"),
        ({**good, "verify_mode": "guess"}, 400, "verify_mode"),
        ({**good, "logprobs": True}, 400, "logprobs"),
    ]
    with httpx.Client(timeout=60) as http:
        for body, status, named in bad:
            answer = http.post(url, json=body)
            assert answer.status_code == status, (body, answer.text)
            assert named in answer.text
        raw = http.post(url, content=b'{"model": "\xff\xfe"}')
        assert raw.status_code == 400
        assert http.post(url, content=b"x" * (5 << 20)).status_code == 413
        assert http.post(url, json=good).status_code == 200
    with InferenceClient(cluster.grpc_address) as client:
        with pytest.raises(InvalidRequestError, match="messages"):
            list(client.generate(chat_request(BUILTIN, [])))
        with pytest.raises(ModelNotFoundError, match="no-such-model"):
            list(client.generate(chat_request("no-such-model", [("user", "Hi")])))
        with pytest.raises(InvalidRequestError, match="max_tokens"):
            list(client.generate(chat_request(BUILTIN, [("user", "Hi")], max_tokens=2**31)))
        with pytest.raises(InvalidRequestError, match="mode"):
            list(client.generate(chat_request(BUILTIN, [("user", "Hi")], mode=77)))
        assert ask(client, "Hi", max_tokens=4)[0]
    with grpc.insecure_channel(cluster.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        huge = inference_pb2.GenerateRequest(model=BUILTIN, text="x" * (5 << 20))
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(huge))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_killed_drafter_costs_no_stream_and_drafting_resumes(
    cluster: LocalCluster, reference: GreedyReference, tokenizer: Any
) -> None:
    draft = serve.get_deployment_handle("draft", "draft")
    before = draft.pid.remote().result(timeout_s=30)
    begun = threading.Event()
    with InferenceClient(cluster.grpc_address) as client, ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(ask, client, prompt, begun) for prompt in PROMPTS]
        assert begun.wait(60), "the verifier does not step"
        os.kill(before, signal.SIGKILL)
        answers = [stream.result(timeout=300) for stream in streams]
        assert_lossless(answers, reference, tokenizer)

        # Ray restarts the replica by itself, the scheduler pairs it, and drafting resumes.
        deadline = time.monotonic() + _RECOVERY_S
        accepted_length = 0.0
        while accepted_length <= 1.0 and time.monotonic() < deadline:
            token_ids, last = ask(client, PROMPTS[1])
            accepted_length = (len(token_ids) - 1) / max(1, last.speculation.steps - 1)
    assert accepted_length > 1.0, "drafting did not resume"
    assert draft.pid.remote().result(timeout_s=30) != before
