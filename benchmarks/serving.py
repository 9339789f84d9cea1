"""What users get of one or more OpenAI-compatible servers, level by level of load, in turn.

Users ask without a pause (`--concurrency`) or requests come at random (`--rate`). At each level the
endpoints take turns, A B A B, for `--rounds`, with the same requests in each turn of a round, so
that a machine whose speed drifts favours none. Without `--endpoint` our own four services are
started and asked with and without drafting.

    python benchmarks/serving.py --concurrency 1,2,4,8 --duration 60 --rounds 3 --plot serving.png
    python benchmarks/serving.py --endpoint ours=http://127.0.0.1:8000/v1 \\
        --endpoint theirs=http://127.0.0.1:9000/v1 --rate 0.5,1,2 --sla-ttft-ms 500 --sla-tpot-ms 50
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from dspark.cli.bench import PROMPTS
from dspark.cli.local_cluster import LocalCluster
from dspark.config import EngineConfig, GatewayConfig, ModelConfig, ServeConfig
from dspark.errors import ConfigError, DSparkError
from dspark.evaluation.latency import Percentiles, Sla, Summary, Turn, summarise
from dspark.evaluation.load import Limits, run_turn
from dspark.evaluation.memory import by_group, children
from dspark.evaluation.openai_client import (
    TAKE_IGNORE_EOS,
    Endpoint,
    discover,
    parse_endpoint,
    try_out,
)
from dspark.evaluation.plots import Point, plot_lines, require_matplotlib
from dspark.evaluation.prompts import read_prompts
from dspark.evaluation.provenance import provenance
from dspark.evaluation.traffic import Load, Workload, closed_loops, lengths, poissons

console = Console(stderr=True)
Memory = dict[str, Mapping[str, int]]  # bytes by service, by moment


@dataclass(frozen=True)
class Cell:
    """One endpoint under one load, all rounds together."""

    load: str
    endpoint: str
    against_first: float | None  # tokens a second against the first endpoint's, median over rounds
    round_tokens_per_s: list[float]
    summary: Summary


def main() -> None:
    options = parse()
    try:
        sla = Sla(options.sla_ttft_ms, options.sla_tpot_ms)
        loads = loads_of(options)
        limits = limits_of(options)
        workload = Workload(
            read_prompts(options.prompts) if options.prompts else PROMPTS,
            lengths("--output-tokens", options.output_tokens),
            lengths("--prompt-words", options.prompt_words) if options.prompt_words else None,
        )
        if options.plot:
            require_matplotlib()
        memory: Memory = {}
        with endpoints_of(options, memory) as endpoints:
            endpoints, cells = asyncio.run(
                measure(endpoints, loads, workload, limits, sla, options)
            )
        report(cells, memory, options)
        if options.output:
            result = {
                "command": shlex.join([Path(sys.executable).name, *sys.argv]),
                "endpoints": [asdict(endpoint) for endpoint in endpoints],
                "sla": asdict(sla),
                "cells": [asdict(cell) for cell in cells],
                "resident_bytes": memory or None,
                **provenance(),
            }
            options.output.write_text(json.dumps(result, indent=2) + "\n")
        if options.plot:
            plot(cells, options)
    except DSparkError as error:
        sys.exit(f"error: {error}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--endpoint", action="append", metavar="NAME=URL", help="URL up to /v1")
    parser.add_argument(
        "--fields", action="append", default=[], metavar="NAME=JSON",
        help="fields for every request of that endpoint, such as 'plain={\"speculate\": false}'",
    )  # fmt: skip
    parser.add_argument("--serve", action="store_true", help="our services; default: no --endpoint")
    parser.add_argument("--concurrency", help="closed loop, users at a time: 1,2,4,8 (the default)")
    parser.add_argument("--rate", help="open loop, Poisson, requests a second: 0.5,1,2")
    parser.add_argument("--duration", type=float, help="seconds a turn asks for (default: 30)")
    parser.add_argument("--requests", type=int, help="asked in a turn, in place of --duration")
    parser.add_argument("--warm-up", type=float, default=1.0, help="seconds left out of each turn")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds one request may take")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output-tokens", default="128", help="128, uniform:32..256 or "
                        "lognormal:MEAN,SIGMA,LOW..HIGH; an answer may end earlier")  # fmt: skip
    parser.add_argument("--prompt-words", help="the same, in words (about a token each) taken from "
                        "the prompts; default: whole prompts")  # fmt: skip
    parser.add_argument("--prompts", type=Path, help="JSONL; default: eight of ours")
    parser.add_argument("--unique-prompts", action="store_true", help="number the prompts, so that "
                        "no cache of prompts helps one endpoint with another's")  # fmt: skip
    parser.add_argument("--ignore-eos", action="store_true", help="for servers that take it")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", default="0", help="of lengths and arrivals")
    parser.add_argument("--sla-ttft-ms", type=float)
    parser.add_argument("--sla-tpot-ms", type=float)
    parser.add_argument("--target", default="smollm2-135m", help="with --serve, as what follows")
    parser.add_argument("--drafter", default="")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=50051)
    parser.add_argument("--output", type=Path, help="JSON with machine, commit and versions")
    parser.add_argument("--plot", type=Path, help="PNG: tokens/s against tokens/s/user")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1; got {options.rounds}")
    for path in filter(None, (options.output, options.plot)):
        if not path.parent.is_dir():  # better known now than after the measurement
            parser.error(f"there is no folder {path.parent} to write {path.name} to")
    if options.serve and options.endpoint:
        parser.error("--serve measures our own services: leave it out, or --endpoint")
    return options


def loads_of(options: argparse.Namespace) -> list[Load]:
    if options.concurrency and options.rate:
        raise ConfigError("--concurrency is closed loop and --rate is open loop: choose one")
    if options.rate:
        return poissons("--rate", options.rate)
    return closed_loops("--concurrency", options.concurrency or "1,2,4,8")


def limits_of(options: argparse.Namespace) -> Limits:
    for option in ("duration", "requests"):
        value = getattr(options, option)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{option} must be above 0; got {value}")
    if options.duration and options.requests:
        raise ConfigError("--duration and --requests both end a turn: choose one")
    duration_s = math.inf if options.requests else options.duration or 30.0
    if not 0 <= options.warm_up < duration_s:
        raise ConfigError(f"--warm-up must be within the {duration_s:g} s; got {options.warm_up}")
    return Limits(
        duration_s=duration_s,
        requests=options.requests or math.inf,
        warm_up_s=options.warm_up,
        timeout_s=options.timeout,
    )


@contextmanager
def endpoints_of(options: argparse.Namespace, memory: Memory) -> Iterator[list[Endpoint]]:
    """Those given, or our services while they run; `memory` is filled in around the latter."""
    if options.endpoint:
        yield given_endpoints(options)
        return
    if options.fields:
        raise ConfigError("--fields is of an --endpoint; our own services get theirs")
    config = ServeConfig(
        model=ModelConfig(options.target, options.drafter, dtype=options.dtype),
        engine=EngineConfig(),
        gateway=GatewayConfig(http_port=options.http_port, grpc_port=options.grpc_port),
    )
    with LocalCluster(config, console.print) as cluster:
        url = f"{cluster.http_url}/v1"
        memory["before"] = by_group(children(), service)
        yield [
            Endpoint("off", url, fields={"speculate": False}),
            Endpoint("drafting", url, fields={"speculate": True}),
        ]
        memory["after"] = by_group(children(), service)


def given_endpoints(options: argparse.Namespace) -> list[Endpoint]:
    endpoints = {}
    for text in options.endpoint:
        endpoint = parse_endpoint("--endpoint", text)
        if endpoint.name in endpoints:
            raise ConfigError(f"two endpoints are called {endpoint.name!r}: give each its own name")
        endpoints[endpoint.name] = endpoint
    for text in options.fields:
        name, _, given = text.partition("=")
        try:
            fields = json.loads(given)
        except ValueError:
            fields = None
        if name not in endpoints or not isinstance(fields, dict):
            raise ConfigError(
                f"--fields wants NAME=JSON, an endpoint's name and an object; got {text!r}"
            )
        endpoints[name] = replace(endpoints[name], fields=fields)
    return list(endpoints.values())


def service(title: str) -> str:
    """Whose process it is, by the title that Ray gives it: `ray::ServeReplica:verifier:…`."""
    _, found, rest = title.partition("ServeReplica:")
    return rest.split(":")[0] if found else "Ray"


async def measure(
    endpoints: list[Endpoint],
    loads: Sequence[Load],
    workload: Workload,
    limits: Limits,
    sla: Sla,
    options: argparse.Namespace,
) -> tuple[list[Endpoint], list[Cell]]:
    """The endpoints with what was found out about them, and a cell for each under each load."""
    # An idle connection goes before the server ends it (uvicorn: after 5 s), lest it be just then.
    pool = httpx.Limits(max_connections=None, keepalive_expiry=2.0)
    async with httpx.AsyncClient(limits=pool) as http:
        endpoints = [await prepared(http, endpoint, options) for endpoint in endpoints]
        for endpoint in endpoints:  # first-use costs are nobody's
            await try_out(http, endpoint, next(workload.asks(options.seed)))
        cells = []
        for load in loads:
            turns: dict[str, list[Turn]] = {endpoint.name: [] for endpoint in endpoints}
            for number in range(options.rounds):
                seed = f"{options.seed}/{load}/{number}"
                for i, endpoint in enumerate(endpoints):
                    console.print(f"{load}, round {number + 1}/{options.rounds}: {endpoint.name}")
                    mark = f"{seed}/{i}" if options.unique_prompts else ""
                    asks = workload.asks(seed, mark)
                    turn = await run_turn(http, endpoint, load, asks, limits, seed)
                    turns[endpoint.name].append(turn)
            cells += cells_of(str(load), turns, sla)
    return endpoints, cells


async def prepared(
    http: httpx.AsyncClient, endpoint: Endpoint, options: argparse.Namespace
) -> Endpoint:
    """With its model, and the fields that it is to get and takes."""
    endpoint = await discover(http, endpoint)
    fields = {"temperature": options.temperature, **endpoint.fields}
    if options.ignore_eos and endpoint.owner in TAKE_IGNORE_EOS:
        fields["ignore_eos"] = True
    elif options.ignore_eos:
        console.print(
            f"{endpoint.name} ({endpoint.owner or 'unknown server'}) is not known to take "
            "ignore_eos: its answers may be shorter; compare tokens/answer"
        )
    return replace(endpoint, fields=fields)


def cells_of(load: str, turns: Mapping[str, list[Turn]], sla: Sla) -> list[Cell]:
    speeds = {
        name: [summarise([turn], sla).tokens_per_s for turn in of_one]
        for name, of_one in turns.items()
    }
    first = next(iter(speeds.values()))
    cells = []
    for name, of_one in turns.items():
        ratios = [own / other for own, other in zip(speeds[name], first, strict=True) if other]
        against = statistics.median(ratios) if ratios else None
        cells.append(Cell(load, name, against, speeds[name], summarise(of_one, sla)))
    return cells


def report(cells: Sequence[Cell], memory: Memory, options: argparse.Namespace) -> None:
    out = Console()
    what = f"{options.output_tokens} output tokens, rounds: {options.rounds}"
    kept = [
        f"{name} ≤ {limit:g} ms"
        for name, limit in (("TTFT", options.sla_ttft_ms), ("per token", options.sla_tpot_ms))
        if limit is not None
    ]
    good = f"good: {', '.join(kept)}" if kept else "no SLA: every answer is good"
    speeds = table(f"Throughput, {what}; {good}", "load", "endpoint", "tokens/s", "against first",
                   "tokens/s/user", "requests/s", "good tokens/s", "good requests/s",
                   "failed")  # fmt: skip
    waits = table("Latency, ms: p50 / p90 / p99", "load", "endpoint", "first token", "per token",
                  "between events", "tokens/event", "tokens/answer", "tokens/prompt",
                  "measured")  # fmt: skip
    for load, group in groupby(cells, key=lambda cell: cell.load):
        for cell in group:
            s = cell.summary
            failed = sum(s.failures.values())
            speeds.add_row(
                load,
                cell.endpoint,
                number(s.tokens_per_s),
                number(cell.against_first, "{:.2f}×"),
                number(s.user_tokens_per_s),
                number(s.requests_per_s, "{:.2f}"),
                number(s.good_tokens_per_s),
                number(s.good_requests_per_s, "{:.2f}"),
                f"{failed} of {s.requests}",
            )
            waits.add_row(
                load,
                cell.endpoint,
                percentiles(s.ttft_ms),
                percentiles(s.tpot_ms),
                percentiles(s.gap_ms),
                number(s.tokens_per_event, "{:.2f}"),
                number(s.output_tokens),
                number(s.prompt_tokens),
                f"{s.measured} of {s.requests}",
            )
        speeds.add_section()
        waits.add_section()
    out.print(speeds)
    out.print(waits)
    if memory:
        out.print(memory_table(memory))
    for cell in cells:
        s = cell.summary
        for reason, count in s.failures.items():
            out.print(f"{cell.load}, {cell.endpoint}: {count} of {s.requests} failed: {reason}")
        if not s.counted:
            out.print(
                f"{cell.load}, {cell.endpoint}: the server sent no usage for some answers: each of "
                "their events counts as one token, too few where an event carries several"
            )
        if not s.measured:
            out.print(
                f"{cell.load}, {cell.endpoint}: no answered request was due after the warm-up: no "
                "latencies; ask for longer, or shorten --warm-up"
            )


def memory_table(memory: Memory) -> Table:
    title = "Resident memory, MiB, summed over a service's processes (shared pages count in each)"
    made = table(title, "service", *memory)
    names = sorted({name for sums in memory.values() for name in sums})
    for name in [*names, "all"]:
        sizes = (sum(m.values()) if name == "all" else m.get(name, 0) for m in memory.values())
        made.add_row(name, *(f"{size / 2**20:.0f}" for size in sizes))
    return made


def plot(cells: Sequence[Cell], options: argparse.Namespace) -> None:
    lines: dict[str, list[Point]] = {}
    for cell in cells:
        if (speed := cell.summary.user_tokens_per_s) is not None:
            point = Point(speed, cell.summary.tokens_per_s, cell.load)
            lines.setdefault(cell.endpoint, []).append(point)
    plot_lines(
        lines,
        options.plot,
        title=f"{options.output_tokens} output tokens, rounds: {options.rounds}",
        x_label="speed of one user, tokens/s (1 / median time per output token)",
        y_label="throughput, tokens/s in all",
    )


def table(title: str, *headings: str) -> Table:
    made = Table(title=title)
    for heading in headings:
        text = heading in ("load", "endpoint", "service")
        made.add_column(heading, justify="left" if text else "right")
    return made


def number(value: float | None, form: str = "{:.1f}") -> str:
    return "–" if value is None else form.format(value)


def percentiles(values: Percentiles | None) -> str:
    if values is None:
        return "–"
    digits = 0 if values.p50 >= 100 else 1
    return " / ".join(f"{p:.{digits}f}" for p in (values.p50, values.p90, values.p99))


if __name__ == "__main__":
    main()
