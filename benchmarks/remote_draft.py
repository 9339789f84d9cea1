"""Adaptive against fixed lengths and no drafting, with the drafter behind gRPC.

What `dspark bench` measures, in turns of a second under an unbroken load, but with the drafter
in a process of its own. Verifier and drafter share this machine's cores, or its GPU, so a block
costs the steps beside it more than it would on machines of their own.

    python benchmarks/remote_draft.py --concurrency 1,2,4,8,16,32 --rounds 20 --fixed 1,2
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dspark.cli.bench import PROMPTS
from dspark.config import DraftConfig, EngineConfig, ModelConfig
from dspark.engine.assembly import LoadedTarget, load_draft_engine
from dspark.engine.llm import LLM
from dspark.evaluation.provenance import provenance
from dspark.evaluation.throughput import measure
from dspark.models.checkpoint import fingerprint
from dspark.models.drafter_folder import drafter_folder
from dspark.pb import draft_pb2, draft_pb2_grpc
from dspark.rpc.draft_link import RemoteDraftLink
from dspark.rpc.server import ReplicaServer
from dspark.services.draft.servicer import DraftServicer
from dspark.services.draft.worker import DraftWorker

console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", default="1,2,4,8,16,32")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--settle", type=float, default=0.0, help="s to learn of each load first")
    parser.add_argument("--fixed", default="1,2", help="lengths to compare; 0: whole blocks")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--drafter", default="")
    parser.add_argument("--device", default="cpu", help="of both; cuda: they share one GPU")
    parser.add_argument("--output", type=Path, help="JSON with machine, commit and versions")
    options = parser.parse_args()
    levels = [int(part) for part in options.concurrency.split(",")]
    model = ModelConfig(options.target, options.drafter, device=options.device)
    with draft_service(model) as address, event_loop() as loop:
        llm = LLM(
            options.target,
            options.drafter,
            device=options.device,
            engine=EngineConfig(max_requests=max(levels)),
            make_link=lambda loaded: connect(loop, address, loaded),
        )
        llm.generate(list(PROMPTS[:1]))  # first-use costs are nobody's
        cells = measure(
            llm.verifier,
            [llm.chat_prompt(prompt) for prompt in PROMPTS],
            concurrencies=levels,
            max_tokens=options.tokens,
            rounds=options.rounds,
            settle_s=options.settle,
            fixed_lengths=[int(part) for part in options.fixed.split(",")],
        )
    table = Table(title=f"{options.target}, drafter behind gRPC, medians of {options.rounds} turns")
    for heading in ("users", "arm", "tokens/s", "against off", "τ", "verified/step"):
        table.add_column(heading, justify="right")
    for cell in cells:
        table.add_row(
            str(cell.concurrency),
            cell.arm,
            f"{cell.tokens_per_s:.1f}",
            f"{cell.against_off:.3f}",
            f"{cell.accepted_length:.2f}",
            f"{cell.verified_per_step:.2f}",
        )
    Console().print(table)
    if options.output:
        result = {"cells": [asdict(cell) for cell in cells], **provenance()}
        options.output.write_text(json.dumps(result, indent=2) + "\n")


@contextmanager
def draft_service(model: ModelConfig) -> Iterator[str]:
    """Its address, while it runs."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_drafts, args=(model, theirs), daemon=True)
    process.start()
    try:
        console.print("starting the draft service …")
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def serve_drafts(model: ModelConfig, parent: Connection) -> None:
    async def serve() -> None:
        config = DraftConfig()
        engine = load_draft_engine(model, config)
        worker = DraftWorker(engine, config.max_batch_works, on_failure=lambda error: None)
        worker.start()
        server = ReplicaServer()
        folder = drafter_folder(model)
        assert folder is not None  # load_draft_engine has refused otherwise
        servicer = DraftServicer(
            worker,
            engine,
            incarnation="benchmark",
            drafter_fingerprint=fingerprint(folder),
            max_streams=1,
        )
        draft_pb2_grpc.add_DraftServicer_to_server(servicer, server.server)
        services = [draft_pb2.DESCRIPTOR.services_by_name["Draft"]]
        port = await server.start("127.0.0.1", 0, services)
        parent.send(f"127.0.0.1:{port}")
        await asyncio.Event().wait()

    asyncio.run(serve())


@contextmanager
def event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """On a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def connect(loop: asyncio.AbstractEventLoop, address: str, loaded: LoadedTarget) -> RemoteDraftLink:
    async def start() -> RemoteDraftLink:
        link = RemoteDraftLink("benchmark", loaded.drafter_fingerprint, loaded.target.vocab_size)
        link.start()
        link.set_peer(address)
        return link

    link = asyncio.run_coroutine_threadsafe(start(), loop).result()
    deadline = time.monotonic() + 10.0
    while not link.connected:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no stream to the draft service at {address} within 10 s")
        time.sleep(0.01)
    return link


if __name__ == "__main__":
    main()
