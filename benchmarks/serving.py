"""What users of a server feel: time to first token, tokens a second each and in all, goodput.

Drives OpenAI-compatible endpoints, in a closed loop (--concurrency) or with Poisson arrivals
(--rate).
Without --endpoint, it starts our four services and compares drafting with plain decoding. Endpoints
take turns at every level, --rounds times, so that a machine whose speed drifts favours none.

    python benchmarks/serving.py --concurrency 1,2,4,8 --plot frontier.png
    python benchmarks/serving.py --rate 0.5,1,2 --output-tokens lognormal:96,0.6,8..400
    python benchmarks/serving.py --endpoint ours=http://127.0.0.1:8000/v1 \\
        --endpoint theirs=http://127.0.0.1:9000/v1 --concurrency 1,8
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from dspark.cli.bench import PROMPTS
from dspark.cli.local_cluster import LocalCluster
from dspark.config import GatewayConfig, ModelConfig, ServeConfig
from dspark.evaluation.latency import Agreement, LatencyReport, summarise
from dspark.evaluation.openai_client import (
    Endpoint,
    OpenAIClient,
    Record,
    closed_loop,
    open_loop,
)
from dspark.evaluation.plots import frontier
from dspark.evaluation.prompts import read_prompts
from dspark.evaluation.provenance import provenance
from dspark.evaluation.traffic import parse_lengths

console = Console(stderr=True)


def main() -> None:
    options = arguments()
    with contextlib.ExitStack() as stack:
        memory: dict[str, float] = {}
        if options.endpoint:
            endpoints = [named(text, options) for text in options.endpoint]
        else:
            endpoints = ours(stack, options)
            memory["before_mib"] = resident_mib()
        cells = asyncio.run(measure(endpoints, options))
        if memory:
            memory["after_mib"] = resident_mib()
    show(cells, options)
    if memory:
        print("resident memory of Ray and all services, MiB: {before_mib:.0f} before, "
              "{after_mib:.0f} after".format(**memory))  # fmt: skip
    if options.plot:
        lines: dict[str, list[tuple[float, float, str]]] = {}
        for cell in cells:
            point = (cell["user_tokens_per_s"], cell["tokens_per_s"], f"{cell['load']:g}")
            lines.setdefault(cell["endpoint"], []).append(point)
        kind = "users" if options.rate is None else "requests/s"
        frontier(options.plot, lines, f"{options.model}: load in {kind}")
    if options.output:
        result = {
            "command": sys.argv,
            "cells": cells,
            "memory": memory,
            **provenance(),
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--endpoint", action="append", help="NAME=URL, with /v1; repeatable")
    parser.add_argument("--model", default="smollm2-135m", help="the name that servers know")
    parser.add_argument(
        "--extra", action="append", default=[], help="NAME={json} added to an endpoint's requests"
    )
    parser.add_argument("--concurrency", default="1,2,4,8", help="users of a closed loop")
    parser.add_argument("--rate", help="requests a second of an open loop, in place of users")
    parser.add_argument("--duration", type=float, default=20.0, help="seconds a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output-tokens", type=parse_lengths, default=parse_lengths("128"))
    parser.add_argument("--prompts", type=Path, help="JSONL; default: eight of ours")
    parser.add_argument("--sla-ttft-ms", type=float, default=1000.0)
    parser.add_argument("--sla-tpot-ms", type=float, default=50.0)
    parser.add_argument("--dtype", default="bfloat16", help="of our own services")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=50051)
    parser.add_argument("--output", type=Path, help="JSON with machine, commit and versions")
    parser.add_argument("--plot", type=Path, help="PNG: throughput against speed of a user")
    return parser.parse_args()


def named(text: str, options: argparse.Namespace) -> Endpoint:
    name, _, url = text.partition("=")
    extras = dict(extra.partition("=")[::2] for extra in options.extra)
    return Endpoint(name, url, options.model, json.loads(extras.get(name, "{}")))


def ours(stack: contextlib.ExitStack, options: argparse.Namespace) -> list[Endpoint]:
    """Our services, used with drafts and without."""
    config = ServeConfig(
        model=ModelConfig(options.model, dtype=options.dtype),
        gateway=GatewayConfig(http_port=options.http_port, grpc_port=options.grpc_port),
    )
    cluster = stack.enter_context(LocalCluster(config, console.print))
    url = f"{cluster.http_url}/v1"
    return [
        Endpoint(name, url, options.model, {"speculate": speculate})
        for name, speculate in (("adaptive", True), ("plain", False))
    ]


async def measure(endpoints: list[Endpoint], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A cell for each level and endpoint: medians over rounds."""
    texts = read_prompts(options.prompts) if options.prompts else list(PROMPTS)
    prompts: Iterator[str] = itertools.cycle(texts)
    agreement = Agreement(options.sla_ttft_ms, options.sla_tpot_ms)
    open_ended = options.rate is not None
    levels = [float(part) for part in (options.rate or options.concurrency).split(",")]
    cells = []
    async with contextlib.AsyncExitStack() as stack:
        clients = {e.name: await stack.enter_async_context(OpenAIClient(e)) for e in endpoints}
        for name, client in clients.items():  # first-use costs are nobody's
            record = await client.ask(texts[0], 16)
            if record.failure:
                raise SystemExit(f"{name} does not answer: {record.failure}")
        for level in levels:
            reports: dict[str, list[LatencyReport]] = {name: [] for name in clients}
            for turn in range(options.rounds):
                for name, client in clients.items():
                    rng = random.Random(turn)  # the same load for all
                    arguments = (client, prompts, options.output_tokens, rng)
                    records: list[Record]
                    if open_ended:
                        records = await open_loop(
                            *arguments, rate=level, duration_s=options.duration
                        )
                    else:
                        records = await closed_loop(
                            *arguments, users=int(level), duration_s=options.duration
                        )
                    reports[name].append(summarise(records, agreement))
                    console.print(
                        f"{level:g} {name}: {reports[name][-1].tokens_per_s:.1f} tokens/s"
                    )
            cells += [{"load": level, "endpoint": n, **medians(r)} for n, r in reports.items()]
    return cells


def medians(reports: list[LatencyReport]) -> dict[str, Any]:
    """Field by field; failures and requests are summed."""
    columns = [asdict(report) for report in reports]
    out: dict[str, Any] = {}
    for key, first in columns[0].items():
        values = [column[key] for column in columns]
        if key == "requests":
            out[key] = sum(values)
        elif key == "failures":
            out[key] = {
                reason: sum(v.get(reason, 0) for v in values) for v in values for reason in v
            }
        elif isinstance(first, tuple):
            out[key] = [statistics.median(part) for part in zip(*values, strict=True)]
        else:
            out[key] = statistics.median(values)
    return out


def show(cells: list[dict[str, Any]], options: argparse.Namespace) -> None:
    arrivals = "requests/s" if options.rate is not None else "users"
    table = Table(title=f"{options.model}, medians of {options.rounds} turns; times in ms")
    for heading in (arrivals, "endpoint", "tokens/s", "tokens/s a user", "TTFT p50", "TTFT p99",
                    "TPOT p50", "TPOT p99", "gap p99", "goodput/s", "good", "failed"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "endpoint" else "right")
    for cell in cells:
        table.add_row(
            f"{cell['load']:g}",
            cell["endpoint"],
            f"{cell['tokens_per_s']:.1f}",
            f"{cell['user_tokens_per_s']:.1f}",
            f"{cell['ttft_ms'][0]:.0f}",
            f"{cell['ttft_ms'][2]:.0f}",
            f"{cell['tpot_ms'][0]:.1f}",
            f"{cell['tpot_ms'][2]:.1f}",
            f"{cell['gap_ms'][2]:.1f}",
            f"{cell['goodput_per_s']:.2f}",
            f"{cell['good_share']:.0%}",
            ", ".join(f"{n} {reason}" for reason, n in cell["failures"].items()) or "0",
        )
    Console().print(table)


def resident_mib() -> float:
    """Of this process's children, Ray's and the replicas among them."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total / 2**20


if __name__ == "__main__":
    main()
