"""How well confidences can order draft tokens at all: the confidence head's AUC and an oracle's.

    python benchmarks/confidence_ceiling.py --prompts gsm8k.jsonl --limit 40

At a temperature, whether a draft token stands is a draw with the probability Σ min(p, q), p being
the target's law and q the drafter's. The oracle forecasts just that, from the target's own logits:
what it lacks to an AUC of 1, no confidence head can have. `rejection`, temperature 1, whole blocks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import typer

import dspark.engine.verifier
from dspark.config import EngineConfig
from dspark.decoding.acceptance import Verdict
from dspark.engine.judge import Judged, judge
from dspark.engine.llm import LLM
from dspark.evaluation.bootstrap import prompt_weights
from dspark.evaluation.held_out import raw_survivals
from dspark.evaluation.prompts import read_files
from dspark.evaluation.reliability import auc, forecasts
from dspark.evaluation.rounds import rounds_of
from dspark.types import SamplingParams


class Oracle:
    """Watches what the engine judges."""

    def __init__(self) -> None:
        self.chances: dict[str, list[np.ndarray]] = {}  # by request: [ℓ] of each round with drafts

    def judge(self, logits: torch.Tensor, judged: list[Judged]) -> list[Verdict]:
        """Note the chance of each draft token, then judge as ever."""
        row = 0
        for one in judged:
            if one.proposal is not None and one.verified:
                p = torch.softmax(logits[row : row + one.verified].float(), dim=-1)
                ids = torch.from_numpy(one.proposal.candidate_ids[: one.verified])
                q = torch.from_numpy(one.proposal.candidate_probs[: one.verified])
                chance = torch.minimum(p.gather(1, ids), q).sum(dim=1).numpy()
                self.chances.setdefault(one.request.id, []).append(chance)
            row += one.verified + 1
        return judge(logits, judged)


def main(
    prompts: list[Path] = typer.Option(..., help="As for dspark eval; repeat for several."),
    limit: int = typer.Option(0, min=0, help="Use the first N prompts of each file; 0: all."),
    target: str = typer.Option("smollm2-135m"),
    drafter: str = typer.Option("", help="Default: the one shipped for the target."),
    tokens: int = typer.Option(128, min=2),
    concurrency: int = typer.Option(16, min=1),
) -> None:
    """Print both AUCs by position, file by file."""
    oracle = Oracle()
    dspark.engine.verifier.judge = oracle.judge
    engine = EngineConfig(max_requests=concurrency, policy="fixed", prompt_lookup=False)
    llm = LLM(target, drafter, dtype="bfloat16", engine=engine)
    print("| prompts | AUC of | " + " | ".join(map(str, range(1, llm.block_size + 1))) + " | all |")
    print("|---" * (llm.block_size + 3) + "|")
    for name, texts in read_files(prompts, limit).items():
        generations, chances = [], []
        for start in range(0, len(texts), concurrency):
            part = texts[start : start + concurrency]
            oracle.chances.clear()
            seeds = range(start, start + len(part))
            generations += llm.generate(
                part, [SamplingParams(temperature=1.0, max_tokens=tokens, seed=s) for s in seeds]
            )
            by_order = sorted(oracle.chances, key=lambda name: int(name.rpartition("-")[2]))
            chances += [oracle.chances[name] for name in by_order]
        rounds = rounds_of(generations, llm.block_size)
        known = np.ones(rounds.confidences.shape)
        for prompt, told in enumerate(chances):
            rows = np.nonzero((rounds.prompt == prompt) & (rounds.verified > 0))[0]
            for row, chance in zip(rows, told[len(told) - len(rows) :], strict=True):
                known[row, : len(chance)] = chance
        weights = prompt_weights(rounds.prompts, 0)[:1]  # the sample itself
        of = {"confidences": raw_survivals(rounds), "the oracle": np.cumprod(known, axis=1)}
        for who, survivals in of.items():
            positions = [*range(rounds.width), None]
            cells = [float(auc(forecasts(rounds, survivals, k), weights)[0]) for k in positions]
            print(f"| {name} | {who} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")


if __name__ == "__main__":
    typer.run(main)
