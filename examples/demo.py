"""The demonstration behind `make demo`: one real prompt through the four services.

Starts the services on local Ray, streams an answer with speculation and again without, prints what
drafting did, and shuts everything down.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from itertools import zip_longest

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dspark.cli.local_cluster import LocalCluster
from dspark.config import GatewayConfig, ModelConfig, ServeConfig
from dspark.errors import DSparkError
from dspark.pb import common_pb2
from dspark.rpc.client import InferenceClient, chat_request

PROMPT = "Explain, step by step, how vaccines work."
console = Console()


@dataclass(frozen=True, slots=True)
class Run:
    """One streamed answer."""

    tokens: int
    seconds: float  # from the first token on
    first_token_s: float
    text: str
    stats: common_pb2.SpeculationStats

    @property
    def tokens_per_s(self) -> float:
        return (self.tokens - 1) / self.seconds if self.seconds > 0 else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=50051)
    options = parser.parse_args()
    config = ServeConfig(
        model=ModelConfig(),
        gateway=GatewayConfig(http_port=options.http_port, grpc_port=options.grpc_port),
    )
    try:
        with LocalCluster(config, console.print) as cluster:
            console.print(f"HTTP {cluster.http_url}/v1   gRPC {cluster.grpc_address}\n")
            show(config.model.target, cluster.grpc_address, options.prompt, options.max_tokens)
            console.print("stopping the services …")
    except DSparkError as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False)
        return 1
    return 0


def show(model: str, address: str, prompt: str, max_tokens: int) -> None:
    """Stream the prompt both ways and compare."""
    with InferenceClient(address) as client:
        stream(client, model, prompt, 8, speculate=True, echo=False)  # first-use costs
        console.print(f"[bold cyan]prompt[/]  {prompt}")
        console.print("[bold cyan]answer[/]  (green: drafted and accepted)\n")
        with_drafts = stream(client, model, prompt, max_tokens, speculate=True, echo=True)
        without = stream(client, model, prompt, max_tokens, speculate=False, echo=False)
    report(with_drafts, without)


def stream(
    client: InferenceClient,
    model: str,
    prompt: str,
    max_tokens: int,
    *,
    speculate: bool,
    echo: bool,
) -> Run:
    """One greedy answer, timed as a user sees it."""
    request = chat_request(
        model, [("user", prompt)], max_tokens=max_tokens, temperature=0.0, speculate=speculate
    )
    started, first, text = time.perf_counter(), 0.0, ""
    for part in client.generate(request):
        first = first or time.perf_counter()
        text += part.text
        if echo:
            for span in part.spans:
                console.print(Text(span.text, "green" if span.drafted else ""), end="")
    ended = time.perf_counter()
    if echo:
        console.print("\n")
    return Run(part.usage.completion_tokens, ended - first, first - started, text, part.speculation)


def report(with_drafts: Run, without: Run) -> None:
    """The two runs side by side, and what drafting did."""
    table = Table(title="the same prompt, greedy")
    for heading in ("", "with speculation", "without"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = [
        ("tokens", str(with_drafts.tokens), str(without.tokens)),
        ("tokens/s", f"{with_drafts.tokens_per_s:.1f}", f"{without.tokens_per_s:.1f}"),
        ("first token", f"{with_drafts.first_token_s:.2f} s", f"{without.first_token_s:.2f} s"),
        (
            "accepted length τ",
            f"{accepted_length(with_drafts):.2f}",
            f"{accepted_length(without):.2f}",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    stats = with_drafts.stats
    drafted_steps = max(1, stats.steps - 1)
    shares = [
        f"{accepted / verified:.2f}"
        for accepted, verified in zip_longest(
            stats.accepted_by_position, stats.verified_by_position, fillvalue=0
        )
    ]
    console.print(
        f"accepted of verified, by block position: {'  '.join(shares) or 'none verified'}",
        highlight=False,
    )
    console.print(
        f"verification budget: {stats.verified_tokens / drafted_steps:.2f} of "
        f"{stats.drafted_tokens / drafted_steps:.2f} drafted tokens a step were worth verifying; "
        f"{stats.accepted_tokens} of {stats.verified_tokens} verified were accepted",
        highlight=False,
    )
    same = with_drafts.text == without.text
    console.print(
        "both answers are the same text"
        if same
        else "the answers differ: without the C++ operators (see `dspark doctor`) a near-tie of "
        "the target in bf16 can fall either way with the shape of the batch",
        style="bold green" if same else "yellow",
    )


def accepted_length(run: Run) -> float:
    """Tokens a step, the prompt's step left out."""
    return (run.tokens - 1) / max(1, run.stats.steps - 1)


if __name__ == "__main__":
    sys.exit(main())
