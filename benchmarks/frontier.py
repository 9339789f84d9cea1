"""The paper's Figures 7 and 8 on this machine: what speed costs, and what is verified, by load.

    python benchmarks/frontier.py --out frontier/ [--concurrency 1,2,4,8,16,32,64] [--rounds 10]
    python benchmarks/frontier.py --out frontier/ --drawn-from frontier/frontier.json

Arms take turns of a second, as in `dspark bench`: plain decoding, one draft token (what an MTP head
brings), whole blocks, adaptive. Writes frontier.json, and with the extra `bench` figure7.png
(throughput against the speed of one user) and figure8.png (verified draft tokens a request and
step, against concurrency), unless told --no-figures: they can be drawn elsewhere. --shape: random
weights of that shape, whose drafter's blocks stand as those of a recorded trace did
(benchmarks/imposed.py).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from imposed import SHAPES, Trace, imposed_verifier

from dspark.cli.bench import PROMPTS
from dspark.config import EngineConfig
from dspark.engine.llm import LLM
from dspark.engine.verifier import VerifierEngine
from dspark.evaluation.plots import Point, plot_lines, require_matplotlib
from dspark.evaluation.prompts import read_prompts
from dspark.evaluation.provenance import provenance
from dspark.evaluation.throughput import ThroughputCell, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--drafter", default="", help="default: the one shipped for the target")
    parser.add_argument("--concurrency", default="1,2,4,8,16,32,64")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--settle", type=float, default=0.0, help="s to learn of each load first")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=Path, help="JSONL; default: those of dspark bench")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape")
    parser.add_argument("--trace", type=Path, help="how its drafter agrees with it")
    parser.add_argument("--no-figures", action="store_true")
    parser.add_argument("--drawn-from", type=Path, help="a frontier.json: draw it, measure nothing")
    options = parser.parse_args()
    levels = [int(part) for part in options.concurrency.split(",")]
    if not options.no_figures:
        require_matplotlib()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.drawn_from is not None:
        stored = json.loads(options.drawn_from.read_text())["cells"]
        draw([ThroughputCell(**cell) for cell in stored], options.out)
        return
    engine = EngineConfig(max_requests=max(levels), cache_tokens=512 * max(64, max(levels)))
    verifier, prompts = _imposed(options, engine) if options.shape else _served(options, engine)
    cells = measure(
        verifier,
        prompts,
        concurrencies=levels,
        max_tokens=options.tokens,
        rounds=options.rounds,
        settle_s=options.settle,
        fixed_lengths=(1, 0),
    )
    result = {"cells": [asdict(cell) for cell in cells], **provenance()}
    (options.out / "frontier.json").write_text(json.dumps(result, indent=2))
    print_table(cells)
    if not options.no_figures:
        draw(cells, options.out)


def _served(
    options: argparse.Namespace, engine: EngineConfig
) -> tuple[VerifierEngine, list[tuple[int, ...]]]:
    """Of a model, and chat prompts."""
    llm = LLM(options.target, options.drafter, device=options.device, engine=engine)
    if not llm.speculative:
        sys.exit(f"nothing drafts for {options.target!r}: name a drafter with --drafter")
    texts = read_prompts(options.prompts) if options.prompts else list(PROMPTS)
    llm.generate(texts[:1])  # first-use costs are nobody's throughput
    return llm.verifier, [llm.chat_prompt(text) for text in texts]


def _imposed(
    options: argparse.Namespace, engine: EngineConfig
) -> tuple[VerifierEngine, list[tuple[int, ...]]]:
    """Of a shape, and prompts of as many tokens as chats have."""
    if options.trace is None:
        sys.exit("--shape needs --trace: record one with benchmarks/imposed.py")
    verifier = imposed_verifier(options.shape, Trace.read(options.trace), engine, options.device)
    rng = random.Random(0)
    first = [rng.randrange(verifier.target.vocab_size) for _ in range(32)]
    return verifier, [
        tuple((token + i) % verifier.target.vocab_size for i in range(rng.randrange(64, 256)))
        for token in first
    ]


def draw(cells: list[ThroughputCell], folder: Path) -> None:
    """Both figures."""
    arms: dict[str, list[ThroughputCell]] = {}
    for cell in cells:
        arms.setdefault(cell.arm, []).append(cell)
    plot_lines(
        {
            arm: [
                Point(c.tokens_per_s / c.concurrency, c.tokens_per_s, str(c.concurrency))
                for c in of_arm
            ]
            for arm, of_arm in arms.items()
        },
        folder / "figure7.png",
        title="throughput against the speed of one user, by users",
        x_label="tokens/s of one user",
        y_label="tokens/s of all",
    )
    plot_lines(
        {
            arm: [Point(c.concurrency, c.verified_per_step) for c in of_arm]
            for arm, of_arm in arms.items()
        },
        folder / "figure8.png",
        title="draft tokens verified a request and step",
        x_label="users",
        y_label="draft tokens",
    )


def print_table(cells: list[ThroughputCell]) -> None:
    """As docs/benchmarks.md has it."""
    print("| users | arm | tokens/s | of one user | against off | τ | verified a step |")
    print("|---|---|---|---|---|---|---|")
    for _, group in groupby(cells, key=lambda cell: cell.concurrency):
        for c in group:
            print(
                f"| {c.concurrency} | {c.arm} | {c.tokens_per_s:.1f} "
                f"| {c.tokens_per_s / c.concurrency:.1f} | {c.against_off:.2f} "
                f"| {c.accepted_length:.2f} | {c.verified_per_step:.2f} |"
            )


if __name__ == "__main__":
    main()
