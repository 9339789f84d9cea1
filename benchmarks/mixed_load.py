"""Easy and hard requests side by side: what it is worth to draft for those who gain by it.

    python benchmarks/mixed_load.py [--concurrency 2,4,8] [--rounds 20]

Half of the users ask for code, greedily; the others chat at a high temperature. Arms take turns of
a second: plain, whole blocks, adaptive drafting for all, and adaptive with the policy by request.
Tokens/s and, by kind, how many blocks were drafted for a round and what a round brought.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from dataclasses import dataclass, field

from dspark.config import EngineConfig
from dspark.engine.llm import LLM
from dspark.types import Request, SamplingParams, StepPlan, VerificationPolicy

EASY = (
    "Write a Python function that returns the n-th Fibonacci number.",
    "Write a Python function to reverse a linked list.",
    "Write a SQL query that finds the three customers with the most revenue.",
    "Write a Python class for a bank account with deposit and withdraw.",
)
HARD = (
    "Write a short story about a robot who learns to paint.",
    "What would a conversation between the sea and the moon be like?",
    "Tell me something surprising.",
    "Write a poem about an argument in a kitchen.",
)
HOT = 1.5

ADAPTIVE = VerificationPolicy.ADAPTIVE
ARMS = {
    "off": StepPlan(policy=VerificationPolicy.OFF, valid_for_s=3600.0),
    "fixed": StepPlan(policy=VerificationPolicy.FIXED, valid_for_s=3600.0),
    "adaptive, for all": StepPlan(policy=ADAPTIVE, valid_for_s=3600.0),
    "adaptive, by request": StepPlan(policy=ADAPTIVE, draft_by_request=True, valid_for_s=3600.0),
}


@dataclass(slots=True)
class Tally:
    """One arm's turns."""

    tokens_per_s: list[float] = field(default_factory=list)
    rounds: dict[str, int] = field(default_factory=lambda: {"easy": 0, "hard": 0})
    blocks: dict[str, int] = field(default_factory=lambda: {"easy": 0, "hard": 0})
    tokens: dict[str, int] = field(default_factory=lambda: {"easy": 0, "hard": 0})


class Users:
    """So many of each kind are always under way."""

    def __init__(self, llm: LLM, count: int, max_tokens: int) -> None:
        self.verifier = llm.verifier
        self._max_tokens = max_tokens
        self._prompts = {
            kind: itertools.cycle([llm.chat_prompt(text) for text in texts])
            for kind, texts in (("easy", EASY), ("hard", HARD))
        }
        self._numbers = itertools.count()
        self._live: set[str] = set()
        for i in range(count):
            self._ask("easy" if i % 2 else "hard", max(1, max_tokens * (i + 1) // count))

    def _ask(self, kind: str, max_tokens: int) -> None:
        number = next(self._numbers)
        sampling = SamplingParams(
            temperature=0.0 if kind == "easy" else HOT, max_tokens=max_tokens, seed=number
        )
        name = f"{kind}-{number}"
        self.verifier.add(Request(name, next(self._prompts[kind]), sampling))
        self._live.add(name)

    def work(self, seconds: float, into: Tally) -> None:
        """Serve for so long."""
        self.step(None)  # what the arm before has asked for is not this one's
        started, tokens = time.perf_counter(), 0
        while (took := time.perf_counter() - started) < seconds:
            tokens += self.step(into)
        into.tokens_per_s.append(tokens / took)

    def step(self, into: Tally | None) -> int:
        """One step; the tokens that it brought."""
        tokens = 0
        for result in self.verifier.step():
            kind = result.request_id.partition("-")[0]
            tokens += len(result.token_ids)
            if into is not None:
                into.rounds[kind] += 1
                into.blocks[kind] += result.drafted > 0
                into.tokens[kind] += len(result.token_ids)
            if result.finish_reason is not None:
                self._live.remove(result.request_id)
                self._ask(kind, self._max_tokens)
        return tokens

    def leave(self) -> None:
        """Everybody goes."""
        for name in self._live:
            self.verifier.abort(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", default="2,4,8")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--drafter", default="")
    options = parser.parse_args()
    levels = [int(part) for part in options.concurrency.split(",")]
    engine = EngineConfig(max_requests=max(levels))
    llm = LLM(options.target, options.drafter, engine=engine)
    llm.generate(EASY[:1])
    llm.verifier.eos_token_ids = ()  # answers of full length
    print(
        "| users | arm | tokens/s | against off | blocks a round, easy | hard | τ easy | τ hard |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for count in levels:
        users = Users(llm, count, options.tokens)
        tallies = {arm: Tally() for arm in ARMS}
        for turn in range(options.rounds + 1):
            for arm, plan in ARMS.items():
                llm.verifier.set_plan(plan)
                users.work(1.0, tallies[arm] if turn else Tally())  # the first is to learn
        users.leave()
        off = tallies["off"].tokens_per_s
        for arm, tally in tallies.items():
            ratios = [own / base for own, base in zip(tally.tokens_per_s, off, strict=True)]
            shares = [tally.blocks[k] / max(1, tally.rounds[k]) for k in ("easy", "hard")]
            lengths = [tally.tokens[k] / max(1, tally.rounds[k]) for k in ("easy", "hard")]
            print(
                f"| {count} | {arm} | {statistics.median(tally.tokens_per_s):.1f} "
                f"| {statistics.median(ratios):.3f} | {shares[0]:.2f} | {shares[1]:.2f} "
                f"| {lengths[0]:.2f} | {lengths[1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
