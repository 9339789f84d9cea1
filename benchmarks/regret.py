"""What the adaptive setting loses to the best fixed one, in virtual time (promise: at most 2 %).

    python benchmarks/regret.py [--concurrency 1,2,4,8,16,32,64] [--machine flat --machine steep]

The engine decides as it always does, while target and drafter take what a machine would take
(dspark.evaluation.virtual_time): so figures hang on decisions alone, whatever this machine is like,
and a run prints the same again. Machines: `flat`, where rows cost nothing up to some 160, like a
large model on a GPU; `padded`, the same in steps of CUDA graphs' sizes; `knee`, where they cost
nothing up to 20, like a small model on a CPU with fast products; `steep`, where each costs. By
`--error` the engine's step times are wrong by so much, each by itself; by `--jitter` every step and
draft is off by so much; and by `--slow` all takes so many times as long, every other third of a
second.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from imposed import Trace

from dspark.config import EngineConfig
from dspark.evaluation.throughput import Turn, arms
from dspark.evaluation.virtual_time import Blocks, Clock, Machine, serve, virtual_verifier
from dspark.models.graphs import KERNELS
from dspark.scheduling.step_table import StepTimeTable

REQUESTS, ROWS, CONTEXTS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 3, 4, 6, 8), (64, 512, 2048)
TEXTS = {"even": (0.7,), "mixed": (0.85, 0.5), "hard": (0.45,)}


def step_table(ms: Callable[[int, int, int], float], padded: tuple[int, ...] = ()) -> StepTimeTable:
    """From `ms`(requests, rows of them all, context tokens of each)."""
    times = tuple(tuple(tuple(ms(r, r * q, c) for q in ROWS) for r in REQUESTS) for c in CONTEXTS)
    return StepTimeTable(REQUESTS, ROWS, CONTEXTS, times, padded)


def _stairs(requests: int, rows: int, context: int) -> float:
    return max(12.0, 0.075 * rows) + 2e-5 * requests * context + 1e-6 * rows


def _knee(requests: int, rows: int, context: int) -> float:
    return 6.5 + 0.3 * requests + 0.12 * max(0, rows - 20) + 1e-4 * requests * context + 1e-6 * rows


def _steep(requests: int, rows: int, context: int) -> float:
    return 12.0 + rows + 1e-4 * requests * context


MACHINES = {
    "flat": Machine(step_table(_stairs), lambda n, size: 1.5 + 0.1 * size + 0.01 * n * size),
    "padded": Machine(
        step_table(_stairs, KERNELS.rows), lambda n, size: 1.5 + 0.1 * size + 0.01 * n * size
    ),
    "knee": Machine(step_table(_knee), lambda n, size: 1.8 + 0.05 * size + 0.05 * n * size),
    "steep": Machine(step_table(_steep), lambda n, size: 2.0 + 0.2 * size + 0.05 * n * size),
}


def wrong(table: StepTimeTable, error: float) -> StepTimeTable:
    """Every time off by a factor of its own, then made monotone as a measured table is."""
    chance = random.Random(0)
    samples = {
        (r, q, c): [table.ms(r, r * q, c) * math.exp(error * chance.gauss(0.0, 1.0))]
        for r in table.requests
        for q in table.rows
        for c in table.contexts
    }
    return StepTimeTable.from_samples(samples, table.padded)


def compare(
    machine: Machine, blocks: Blocks, users: int, fixed: list[int], *, error: float, seconds: float
) -> dict[str, Turn]:
    """What each arm brings, by itself and from its start."""
    config = EngineConfig(max_requests=users, cache_tokens=1024 * users, prompt_lookup=False)
    believed = wrong(machine.step, error) if error else None
    turns = {}
    for arm, plan in arms(fixed).items():
        clock = Clock()
        verifier = virtual_verifier(clock, machine, blocks, config, believed=believed)
        turns[arm] = serve(verifier, clock, plan, users=users, seconds=seconds)
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", default="1,2,4,8,16,32,64")
    parser.add_argument("--machine", action="append", choices=MACHINES, help="default: all")
    parser.add_argument("--text", action="append", choices=TEXTS, help="default: all")
    parser.add_argument("--trace", type=Path, help="blocks by benchmarks/imposed.py, for texts")
    parser.add_argument("--fixed", default="1,2,3,5,7", help="draft tokens of fixed blocks")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each arm, of virtual time")
    parser.add_argument("--error", type=float, default=0.0)
    parser.add_argument("--jitter", type=float, default=0.0)
    parser.add_argument("--slow", type=float, default=1.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    fixed = [int(length) for length in options.fixed.split(",")]
    if options.trace is None:
        texts = {name: Blocks.made_up(TEXTS[name], 7) for name in options.text or TEXTS}
    else:
        trace = Trace.read(options.trace)
        texts = {options.trace.stem: Blocks([trace.confidences.numpy()], [trace.accepted.numpy()])}
    names = [*arms(fixed)]
    print(f"| machine | text | users | {' | '.join(names[1:])} | τ | verified a step | regret |")
    print("|---" * (len(names) + 5) + "|")
    worst = -1.0
    for name in options.machine or MACHINES:
        machine = replace(MACHINES[name], jitter=options.jitter, slow=options.slow)
        for text, blocks in texts.items():
            for users in map(int, options.concurrency.split(",")):
                found = compare(
                    machine, blocks, users, fixed, error=options.error, seconds=options.seconds
                )
                speeds = [turn.tokens_per_s for turn in found.values()]
                adaptive = found["adaptive"]
                regret = max(speeds[:-1]) / speeds[-1] - 1.0
                worst = max(worst, regret)
                shown = " | ".join(f"{speed / speeds[0]:.3f}" for speed in speeds[1:])
                print(
                    f"| {name} | {text} | {users} | {shown} | {adaptive.accepted_length:.2f} | "
                    f"{adaptive.verified_per_step:.2f} | {regret:+.1%} |",
                    flush=True,
                )
    print(f"\nat worst {worst:+.1%}")


if __name__ == "__main__":
    main()
