"""What the services cost: the same prompts in process and through all four services, in turn.

Each level of concurrency is measured `--rounds` times on either side, closed loop: as many clients
as requests at a time, each sending the next prompt when the last answer ends. Greedy, bf16.

    python benchmarks/services.py --concurrency 1,8 --tokens 128 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dspark.cli.bench import PROMPTS
from dspark.cli.local_cluster import LocalCluster
from dspark.config import GatewayConfig, ModelConfig, ServeConfig
from dspark.engine.llm import LLM
from dspark.evaluation.provenance import provenance
from dspark.rpc.client import InferenceClient, chat_request
from dspark.types import SamplingParams

console = Console(stderr=True)


@dataclass(frozen=True)
class Cell:
    """Medians over rounds at one concurrency."""

    concurrency: int
    speculate: bool
    in_process_tokens_per_s: float
    services_tokens_per_s: float
    first_token_ms: float  # p50 through the services
    between_tokens_ms: float  # p50 of the mean gap of an answer, through the services

    @property
    def ratio(self) -> float:
        return self.services_tokens_per_s / self.in_process_tokens_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", default="1,8")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=50051)
    parser.add_argument("--output", type=Path, help="JSON with machine, commit and versions")
    options = parser.parse_args()
    levels = [int(part) for part in options.concurrency.split(",")]
    config = ServeConfig(
        model=ModelConfig(options.target),
        gateway=GatewayConfig(http_port=options.http_port, grpc_port=options.grpc_port),
    )
    llm = LLM(options.target)
    cells = []
    with (
        LocalCluster(config, console.print) as cluster,
        InferenceClient(cluster.grpc_address) as client,
    ):
        served(client, options.target, 1, 16, True)  # first-use costs are nobody's
        in_process(llm, 1, 16, True)
        for level in levels:
            for speculate in (False, True):
                inside, outside = [], []
                for _ in range(options.rounds):
                    inside.append(in_process(llm, level, options.tokens, speculate))
                    outside.append(served(client, options.target, level, options.tokens, speculate))
                speed, first, between = (
                    statistics.median(column) for column in zip(*outside, strict=True)
                )
                cell = Cell(level, speculate, statistics.median(inside), speed, first, between)
                cells.append(cell)
                console.print(cell)
    table = Table(title=f"{options.target}, up to {options.tokens} tokens, greedy")
    for heading in ("concurrency", "drafting", "in process, tokens/s", "services, tokens/s",
                    "ratio", "first token, ms", "between tokens, ms"):  # fmt: skip
        table.add_column(heading, justify="right")
    for cell in cells:
        table.add_row(
            str(cell.concurrency),
            "adaptive" if cell.speculate else "off",
            f"{cell.in_process_tokens_per_s:.1f}",
            f"{cell.services_tokens_per_s:.1f}",
            f"{cell.ratio:.2f}",
            f"{cell.first_token_ms:.0f}",
            f"{cell.between_tokens_ms:.1f}",
        )
    Console().print(table)
    if options.output:
        results = [{**asdict(cell), "ratio": cell.ratio} for cell in cells]
        options.output.write_text(json.dumps({"cells": results, **provenance()}, indent=2) + "\n")


def in_process(llm: LLM, concurrency: int, tokens: int, speculate: bool) -> float:
    """Tokens a second of `concurrency` prompts at once."""
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, speculate=speculate)
    started = time.perf_counter()
    answers = llm.generate(batch(concurrency), sampling)
    return sum(len(a.token_ids) for a in answers) / (time.perf_counter() - started)


def served(
    client: InferenceClient, model: str, concurrency: int, tokens: int, speculate: bool
) -> tuple[float, float, float]:
    """The same through gRPC; also medians of time to first token and between tokens, in ms."""

    def ask(text: str) -> tuple[int, float, float]:
        request = chat_request(
            model, [("user", text)], max_tokens=tokens, temperature=0.0, speculate=speculate
        )
        sent = time.perf_counter()
        first, count = 0.0, 0
        for part in client.generate(request):
            if part.token_ids and not count:
                first = time.perf_counter()
            count += len(part.token_ids)
        gap = (time.perf_counter() - first) / max(1, count - 1)
        return count, (first - sent) * 1e3, gap * 1e3

    with ThreadPoolExecutor(concurrency) as pool:
        started = time.perf_counter()
        counts, firsts, gaps = zip(*pool.map(ask, batch(concurrency)), strict=True)
        took = time.perf_counter() - started
    return sum(counts) / took, statistics.median(firsts), statistics.median(gaps)


def batch(concurrency: int) -> list[str]:
    return [PROMPTS[i % len(PROMPTS)] for i in range(concurrency)]


if __name__ == "__main__":
    main()
