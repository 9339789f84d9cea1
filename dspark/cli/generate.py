"""`dspark generate`: a file of prompts to a file of answers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dspark.cli.connection import TLS_CA, TLS_CERT, TLS_KEY, TLS_NAME, connect
from dspark.cli.console import err, progress_bar, reported_errors

if TYPE_CHECKING:
    from dspark.rpc.client import InferenceClient


def generate(
    prompts: Path = typer.Option(..., help='JSONL: {"prompt": "…"} or {"turns": ["…", …]} a line.'),
    out: Path = typer.Option(..., help="JSONL to write, one answer a prompt, in order."),
    in_process: bool = typer.Option(
        False, help="Load the models here instead of asking a service."
    ),
    address: str = typer.Option("127.0.0.1:50051", help="host:port of the gateway's gRPC server."),
    target: str = typer.Option("smollm2-135m", help="Model to ask for, or to load."),
    drafter: str = typer.Option("", help="As for serve, with --in-process."),
    dtype: str = typer.Option("bfloat16", help="Precision, with --in-process."),
    limit: int = typer.Option(0, help="Use the first N prompts; 0: all."),
    max_tokens: int = typer.Option(128, min=1, help="Tokens an answer, at most."),
    temperature: float = typer.Option(0.0, help="0 is greedy."),
    top_p: float = typer.Option(1.0, help="Smallest set of tokens with this mass."),
    top_k: int = typer.Option(0, help="Most likely tokens only; 0: off."),
    seed: int = typer.Option(0, min=0, help="Prompt i uses seed + i."),
    mode: str = typer.Option("rejection", help="rejection or coupled."),
    no_speculation: bool = typer.Option(False, help="Plain decoding."),
    concurrency: int = typer.Option(8, min=1, help="Prompts at a time."),
    tls_ca: str = TLS_CA,
    tls_cert: str = TLS_CERT,
    tls_key: str = TLS_KEY,
    tls_name: str = TLS_NAME,
) -> None:
    """Answer every prompt of a file, as a service's client or with models loaded here.

    An API key is taken from $DSPARK_API_KEY.
    """
    with reported_errors():
        from dspark.errors import ConfigError
        from dspark.evaluation.prompts import read_prompts
        from dspark.types import SamplingParams, VerifyMode

        if mode not in tuple(VerifyMode):
            raise ConfigError(f"--mode must be one of {', '.join(VerifyMode)}; got {mode!r}")
        texts = read_prompts(prompts, limit)
        sampling = [
            SamplingParams(
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                max_tokens=max_tokens,
                seed=seed + i,
                mode=VerifyMode(mode),
                speculate=not no_speculation,
            )
            for i in range(len(texts))
        ]
        if in_process:
            answers = _in_process(texts, sampling, target, drafter, dtype, concurrency)
        else:
            client = connect(address, tls_ca, tls_cert, tls_key, tls_name)
            answers = _through_service(texts, sampling, target, client, concurrency)
        with progress_bar() as bar, out.open("w", encoding="utf-8") as lines:
            for answer in bar.track(answers, total=len(texts), description="prompts"):
                lines.write(json.dumps(answer, ensure_ascii=False) + "\n")
        err.print(f"{len(texts)} answers in {out}", highlight=False)


def _in_process(
    texts: list[str], sampling: list[Any], target: str, drafter: str, dtype: str, concurrency: int
) -> Iterable[dict[str, Any]]:
    from dspark.config import EngineConfig
    from dspark.engine.llm import LLM

    err.print("loading and profiling …")
    llm = LLM(target, drafter, dtype=dtype, engine=EngineConfig(max_requests=concurrency))
    for start in range(0, len(texts), concurrency):
        part = slice(start, start + concurrency)
        for text, made in zip(texts[part], llm.generate(texts[part], sampling[part]), strict=True):
            yield {
                "prompt": text,
                "text": made.text,
                "token_ids": made.token_ids,
                "finish_reason": made.finish_reason,
                "steps": made.steps,
                "drafted": made.drafted,
                "accepted": made.accepted,
            }


def _through_service(
    texts: list[str], sampling: list[Any], target: str, client: InferenceClient, concurrency: int
) -> Iterable[dict[str, Any]]:
    from dspark.pb import common_pb2
    from dspark.rpc.client import chat_request
    from dspark.wire.requests import sampling_to_pb

    with client:

        def ask(text: str, wanted: Any) -> dict[str, Any]:
            request = chat_request(
                target,
                [("user", text)],
                max_tokens=wanted.max_tokens,
                temperature=wanted.temperature,
                top_p=wanted.top_p,
                top_k=wanted.top_k,
                seed=wanted.seed,
                mode=sampling_to_pb(wanted).mode,
                speculate=wanted.speculate,
            )
            answer = ""
            token_ids: list[int] = []
            for part in client.generate(request):
                answer += part.text
                token_ids += part.token_ids
            reason = common_pb2.FinishReason.Name(part.finish_reason)
            return {
                "prompt": text,
                "text": answer,
                "token_ids": token_ids,
                "finish_reason": reason.removeprefix("FINISH_REASON_").lower(),
                "steps": part.speculation.steps,
                "drafted": part.speculation.drafted_tokens,
                "accepted": part.speculation.accepted_tokens,
            }

        with ThreadPoolExecutor(concurrency) as pool:
            yield from pool.map(ask, texts, sampling)
