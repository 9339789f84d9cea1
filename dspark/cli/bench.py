"""`dspark bench`: tokens a second in this process, with and without drafting."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import typer
from rich.table import Table

from dspark.cli.console import err, out, progress_bar, reported_errors

PROMPTS = (
    "Write a Python function that returns the n-th Fibonacci number.",
    "Explain how photosynthesis works.",
    "What is the capital of France, and what is it known for?",
    "A train travels 60 miles in 1.5 hours. What is its average speed?",
    "Write a short story about a robot who learns to paint.",
    "List five tips for learning a new language.",
    "Describe the water cycle to a child.",
    "Write a SQL query that finds the three customers with the most revenue.",
)


def bench(
    target: str = typer.Option("smollm2-135m", help="Built-in name, folder or Hugging Face id."),
    drafter: str = typer.Option("", help="As for serve; default: the one shipped for the target."),
    concurrency: str = typer.Option("1,4,8", help="Requests at a time, comma-separated."),
    tokens: int = typer.Option(128, min=2, help="New tokens a request."),
    rounds: int = typer.Option(10, min=1, help="Turns of each arm; medians are reported."),
    block_size: int = typer.Option(0, help="Draft tokens a round; 0: the drafter's own."),
    fixed: str = typer.Option("0", help="Fixed lengths to compare; 0: whole blocks."),
    dtype: str = typer.Option("bfloat16", help="float32, bfloat16 or float16."),
    prompts: Path | None = typer.Option(None, help="JSONL with prompts; default: eight of ours."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON with machine and versions."),
) -> None:
    """Compare no drafting, fixed blocks and adaptive verification, greedy, in process.

    The arms take turns of a second while users ask without a pause.
    """
    with reported_errors():
        from dspark.config import EngineConfig
        from dspark.engine.llm import LLM
        from dspark.errors import ConfigError
        from dspark.evaluation.prompts import read_prompts
        from dspark.evaluation.provenance import provenance
        from dspark.evaluation.throughput import measure

        levels = _numbers("--concurrency", concurrency, least=1)
        fixed_lengths = _numbers("--fixed", fixed, least=0)
        err.print("loading and profiling …")
        llm = LLM(
            target,
            drafter,
            dtype=dtype,
            engine=EngineConfig(max_requests=max(levels), block_size=block_size),
        )
        if not llm.speculative:
            raise ConfigError(f"nothing drafts for {target!r} with --drafter {drafter!r}: name one")
        texts = read_prompts(prompts) if prompts else list(PROMPTS)
        llm.generate(texts[:1])  # first-use costs are nobody's throughput
        with progress_bar() as bar:
            task = bar.add_task("measuring", total=None)
            cells = measure(
                llm.verifier,
                [llm.chat_prompt(text) for text in texts],
                concurrencies=levels,
                max_tokens=tokens,
                rounds=rounds,
                fixed_lengths=fixed_lengths,
                on_progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        if as_json:
            payload = {"cells": [asdict(cell) for cell in cells], **provenance()}
            typer.echo(json.dumps(payload, indent=2))
            return
        table = Table(title=f"{target}, {tokens} new tokens, greedy, medians of {rounds}")
        for heading in ("concurrency", "arm", "tokens/s", "against off", "τ", "verified/step",
                        "of predicted"):  # fmt: skip
            table.add_column(heading, justify="left" if heading == "arm" else "right")
        for _, group in groupby(cells, key=lambda cell: cell.concurrency):
            arms = list(group)
            for cell in arms:
                table.add_row(
                    str(cell.concurrency),
                    cell.arm,
                    f"{cell.tokens_per_s:.1f}",
                    f"{cell.against_off:.2f}×",
                    f"{cell.accepted_length:.2f}",
                    f"{cell.verified_per_step:.2f}",
                    f"{cell.efficiency:.3f}",
                )
        out.print(table)


def _numbers(option: str, text: str, least: int) -> list[int]:
    from dspark.errors import ConfigError

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} wants numbers, such as 1,4,8; got {text!r}") from error
    if min(numbers) < least:
        raise ConfigError(f"{option} wants numbers from {least} on; got {text!r}")
    return numbers
