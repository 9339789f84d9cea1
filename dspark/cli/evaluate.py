"""`dspark eval`: how good a drafter is, in the real loop."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import typer
from rich.table import Table

from dspark.cli.console import err, out, progress_bar, reported_errors


def evaluate(
    prompts: Path = typer.Option(..., help='JSONL: {"prompt": "…"} or {"turns": ["…", …]} a line.'),
    target: str = typer.Option("smollm2-135m", help="Built-in name, folder or Hugging Face id."),
    drafter: str = typer.Option("", help="As for serve; default: the one shipped for the target."),
    limit: int = typer.Option(0, help="Use the first N prompts; 0: all."),
    tokens: int = typer.Option(128, min=2, help="New tokens a prompt, at most."),
    temperature: float = typer.Option(0.0, help="0 is greedy."),
    block_size: int = typer.Option(0, help="Draft tokens a round; 0: the drafter's own."),
    concurrency: int = typer.Option(
        8, min=1, help="Prompts at a time; does not change the result."
    ),
    mode: str = typer.Option("rejection", help="rejection or coupled."),
    dtype: str = typer.Option("bfloat16", help="float32, bfloat16 or float16."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON with machine and versions."),
) -> None:
    """Accepted length τ and acceptance by position, every drafted token verified.

    τ counts tokens a verification step, the target's own included. Acceptance by position is
    conditional: of the tokens whose predecessors were all accepted, the share accepted.
    """
    with reported_errors():
        from dspark.config import EngineConfig
        from dspark.engine.llm import LLM
        from dspark.errors import ConfigError
        from dspark.evaluation.acceptance import report
        from dspark.evaluation.prompts import read_prompts
        from dspark.evaluation.provenance import provenance
        from dspark.types import SamplingParams, VerifyMode

        if mode not in tuple(VerifyMode):
            raise ConfigError(f"--mode must be one of {', '.join(VerifyMode)}; got {mode!r}")
        texts = read_prompts(prompts, limit)
        settings = EngineConfig(max_requests=concurrency, policy="fixed", block_size=block_size)
        err.print("loading …")
        llm = LLM(target, drafter, dtype=dtype, engine=settings)
        if not llm.speculative:
            raise ConfigError(f"nothing drafts for {target!r} with --drafter {drafter!r}: name one")
        sampling = SamplingParams(temperature=temperature, max_tokens=tokens, mode=VerifyMode(mode))
        generations = []
        with progress_bar() as bar:
            task = bar.add_task("prompts", total=len(texts))
            for start in range(0, len(texts), concurrency):
                generations += llm.generate(texts[start : start + concurrency], sampling)
                bar.update(task, completed=len(generations))
        summary = report(generations)
        if as_json:
            typer.echo(json.dumps({**asdict(summary), **provenance()}, indent=2))
            return
        low, high = summary.interval
        out.print(
            f"accepted length τ = [bold]{summary.accepted_length:.3f}[/] "
            f"(95 % {low:.3f} to {high:.3f}), {summary.prompts} prompts, {summary.tokens} tokens"
        )
        table = Table(title="acceptance given that all before were accepted")
        table.add_column("position", justify="right")
        table.add_column("acceptance", justify="right")
        table.add_column("n", justify="right")
        rows = zip(summary.by_position, summary.verified_by_position, strict=True)
        for k, (share, count) in enumerate(rows, start=1):
            table.add_row(str(k), f"{share:.3f}", str(count))
        out.print(table)
