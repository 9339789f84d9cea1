"""Plain decoding in process beside another engine, in turn: ours, theirs, ours, theirs.

The other engine is a command that stays: for each line on its standard input, a JSON object with
`prompts` (token ids), `tokens` and `concurrency` (a list), it answers greedily with exactly so many
new tokens and prints `RESULT {"tokens_per_s": {"1": …, "8": …}}`. Prefill is part of the time.

    python benchmarks/peers.py --peer '<python> benchmarks/peer_vllm.py CHECKPOINT' --turns 5
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
    parser.add_argument("--peer", required=True, help="command of the other engine")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--concurrency", default="1,4,8,16,32")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument(
        "--drafter", default="none", help="'none' decodes plainly; '' is the shipped"
    )
    parser.add_argument("--output", type=Path, help="JSON with machine, commit and versions")
    options = parser.parse_args()
    levels = [int(level) for level in options.concurrency.split(",")]
    llm = LLM(options.target, options.drafter, engine=EngineConfig(max_requests=max(levels)))
    llm.verifier.eos_token_ids = ()
    prompts = [llm.chat_prompt(text) for text in PROMPTS]
    asked = json.dumps({"prompts": prompts, "tokens": options.tokens, "concurrency": levels})
    own, other = [], []
    with subprocess.Popen(
        shlex.split(options.peer), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as peer:
        for turn in range(options.turns + 1):
            pair = own_turn(llm, prompts, levels, options.tokens), their_turn(peer, asked)
            if turn:  # the first warms both up
                own.append(pair[0])
                other.append(pair[1])
        assert peer.stdin is not None
        peer.stdin.close()
    table = Table(title=f"{options.target}, {options.tokens} tokens, medians of {options.turns}")
    for heading in ("concurrency", "ours, tokens/s", "theirs, tokens/s", "ratio"):
        table.add_column(heading, justify="right")
    cells = []
    for level in map(str, levels):
        ours, theirs = (statistics.median(turn[level] for turn in turns) for turns in (own, other))
        cells.append({"concurrency": int(level), "ours": ours, "theirs": theirs})
        table.add_row(level, f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}")
    Console().print(table)
    if options.output:
        result = {"command": sys.argv, "cells": cells, "own": own, "other": other, **provenance()}
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def own_turn(
    llm: LLM, prompts: list[tuple[int, ...]], levels: list[int], max_tokens: int
) -> Speeds:
    """Tokens a second at each concurrency."""
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    llm.generate(prompts[:1], sampling)
    speeds = {}
    for level in levels:
        batch = [prompts[i % len(prompts)] for i in range(level)]
        started = time.perf_counter()
        tokens = sum(len(answer.token_ids) for answer in llm.generate(batch, sampling))
        speeds[str(level)] = tokens / (time.perf_counter() - started)
    return speeds


def their_turn(peer: subprocess.Popen[str], asked: str) -> Speeds:
    assert peer.stdin is not None
    assert peer.stdout is not None
    peer.stdin.write(asked + "\n")
    peer.stdin.flush()
    for line in peer.stdout:
        if line.startswith("RESULT "):
            speeds: Speeds = json.loads(line.removeprefix("RESULT "))["tokens_per_s"]
            return speeds
    raise SystemExit("the other engine ended without a result; see what it said above")


if __name__ == "__main__":
    main()
