"""Plain decoding in process beside another engine, in turn: ours, theirs, ours, theirs.

The other engine is any command that prints a line `RESULT {"tokens_per_s": {"1": …, "8": …}}` for
the same prompts: chat turns, greedy, exactly `--tokens` new tokens, prefill included.

    python benchmarks/peers.py --peer 'python vllm_cpu.py CHECKPOINT' --turns 3
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dspark.cli.bench import PROMPTS
from dspark.config import EngineConfig
from dspark.engine.llm import LLM
from dspark.evaluation.provenance import provenance
from dspark.types import SamplingParams

Speeds = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="command of the other engine")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--concurrency", default="1,4,8,16,32")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument(
        "--drafter", default="none", help="'none' decodes plainly; '' is the shipped"
    )
    parser.add_argument("--output", type=Path, help="JSON with machine, commit and versions")
    options = parser.parse_args()
    levels = options.concurrency.split(",")
    if options.peer is None:  # one turn, as the other engine's command makes one
        print("RESULT " + json.dumps({"tokens_per_s": own_turn(options)}))
        return
    own, other = [], []
    ours = [sys.executable, __file__]
    for name in ("concurrency", "tokens", "target", "drafter"):
        ours += [f"--{name}", str(getattr(options, name))]
    for _ in range(options.turns):
        own.append(run(ours))
        other.append(run(shlex.split(options.peer)))
    table = Table(title=f"{options.target}, {options.tokens} tokens, medians of {options.turns}")
    for heading in ("concurrency", "ours, tokens/s", "theirs, tokens/s", "ratio"):
        table.add_column(heading, justify="right")
    cells = []
    for level in levels:
        ours_median, theirs_median = (
            statistics.median(turn[level] for turn in turns) for turns in (own, other)
        )
        ratio = ours_median / theirs_median
        cells.append({"concurrency": int(level), "ours": ours_median, "theirs": theirs_median})
        table.add_row(level, f"{ours_median:.0f}", f"{theirs_median:.0f}", f"{ratio:.2f}")
    Console().print(table)
    if options.output:
        result = {"cells": cells, "own": own, "other": other, **provenance()}
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def own_turn(options: argparse.Namespace) -> Speeds:
    """Tokens a second at each concurrency, in a fresh process as the other engine has."""
    levels = [int(level) for level in options.concurrency.split(",")]
    llm = LLM(options.target, options.drafter, engine=EngineConfig(max_requests=max(levels)))
    llm.verifier.eos_token_ids = ()
    sampling = SamplingParams(temperature=0.0, max_tokens=options.tokens)
    llm.generate(PROMPTS[:1], sampling)
    speeds = {}
    for level in levels:
        batch = [PROMPTS[i % len(PROMPTS)] for i in range(level)]
        rounds = 3 if level == 1 else 1
        started = time.perf_counter()
        tokens = sum(len(a.token_ids) for _ in range(rounds) for a in llm.generate(batch, sampling))
        speeds[str(level)] = tokens / (time.perf_counter() - started)
    return speeds


def run(command: list[str]) -> Speeds:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
    speeds: Speeds = json.loads(line.removeprefix("RESULT "))["tokens_per_s"]
    return speeds


if __name__ == "__main__":
    main()
