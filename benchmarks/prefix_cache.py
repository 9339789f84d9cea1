"""What a warm prefix does to speed and acceptance: many questions after one long system prompt.

The same requests run with the prefix cache off and on, so many at a time. Every drafted token is
verified. The cache is worth having only if a request that skips the prefix is drafted for as well
as one that computed it: texts must be equal, and so must accepted lengths, up to 3 %.

    python benchmarks/prefix_cache.py --concurrency 8
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dspark.cli.bench import PROMPTS
from dspark.config import EngineConfig
from dspark.engine.llm import LLM
from dspark.evaluation.provenance import provenance
from dspark.evaluation.rounds import rounds_of
from dspark.types import SamplingParams

_LEAST_ACCEPTANCE = 0.97  # of cold
_RULES = (
    "You answer for a shop that sells garden tools. Be brief, be kind, and never promise what is "
    "not on the shelf. Spades cost 30, rakes 20, shears 15 and hoses 25. We open at nine and close "
    "at six, but on Sundays we rest. Whoever asks for advice on plants gets one tip and the "
    "number of our gardener. Whoever complains gets an apology, and a voucher of 5 if it rained. "
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--output", type=Path, help="JSON with machine, commit and versions")
    options = parser.parse_args()
    runs = {name: run(options, cache) for name, cache in (("cold", False), ("warm", True))}
    ratio = runs["warm"]["accepted_length"] / runs["cold"]["accepted_length"]
    same = runs["warm"].pop("texts") == runs["cold"].pop("texts")
    table = Table(
        title=f"{options.requests} requests, {options.concurrency} at a time, shared prefix"
    )
    names = list(runs["cold"])
    for heading in ("", *(name.replace("_", " ") for name in names)):
        table.add_column(heading, justify="right")
    for name, figures in runs.items():
        table.add_row(name, *(f"{figures[key]:.4g}" for key in names))
    Console().print(table)
    print(f"accepted length, warm over cold: {ratio:.3f}; texts {'equal' if same else 'DIFFER'}")
    if options.output:
        result = {**runs, "acceptance_ratio": ratio, "texts_equal": same, **provenance()}
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if same and ratio >= _LEAST_ACCEPTANCE else 1


def run(options: argparse.Namespace, cache: bool) -> dict:
    """One pass over all requests; with the cache, the first of them fills it."""
    engine = EngineConfig(
        max_requests=options.concurrency, policy="fixed", prefix_cache=cache, check_pages=True
    )
    llm = LLM(options.target, engine=engine)
    questions = [
        f"{PROMPTS[i % len(PROMPTS)]} Answer as customer number {i}."
        for i in range(options.requests + 1)
    ]
    prompts = [prompt(llm, question) for question in questions]
    sampling = SamplingParams(temperature=0.0, max_tokens=options.tokens)
    llm.generate(prompts[:1], sampling)
    cached = llm.verifier.roster.cached_tokens
    started = time.perf_counter()
    answers = llm.generate(prompts[1:], sampling)
    took_s = time.perf_counter() - started
    tokens = sum(len(answer.token_ids) for answer in answers)
    return {
        "accepted_length": float(rounds_of(answers).tokens.mean()),
        "accepted": sum(answer.accepted for answer in answers),
        "prompt_tokens": sum(map(len, prompts[1:])),
        "cached_tokens": llm.verifier.roster.cached_tokens - cached,
        "tokens_per_s": tokens / took_s,
        "texts": [answer.token_ids for answer in answers],
    }


def prompt(llm: LLM, question: str) -> list[int]:
    encoded = llm.tokenizer.apply_chat_template(
        [{"role": "system", "content": 3 * _RULES}, {"role": "user", "content": question}],
        add_generation_prompt=True,
        return_dict=True,
    )
    return list(encoded["input_ids"])


if __name__ == "__main__":
    sys.exit(main())
