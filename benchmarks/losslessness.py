"""Greedy output of the running services against the target's own, token for token.

Starts the four services, sends prompts through the gateway, and compares. In fp32 the reference is
transformers' generate(); in bf16, where that rounds otherwise, the services' own plain decoding.
Where a text differs, the two best fp32 logits there must be nearly tied, and the case is reported.
The run counts for nothing, and fails, if nothing was drafted or nothing accepted.

    python benchmarks/losslessness.py --prompts FILE.jsonl [FILE.jsonl …] --each 10 --tokens 64
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from transformers import AutoModelForCausalLM

from dspark.cli.local_cluster import LocalCluster
from dspark.config import EngineConfig, GatewayConfig, ModelConfig, ServeConfig
from dspark.evaluation.losslessness import GreedyReference
from dspark.evaluation.prompts import read_prompts
from dspark.evaluation.provenance import provenance
from dspark.models.builtin import resolve_target
from dspark.models.tokenizer import load_tokenizer
from dspark.rpc.client import InferenceClient, chat_request

console = Console(stderr=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, nargs="+", required=True)
    parser.add_argument("--each", type=int, default=10, help="prompts from each file")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--drafter", default="")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--policy", default="fixed", help="fixed verifies every drafted token")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=50051)
    options = parser.parse_args()
    texts = [text for path in options.prompts for text in read_prompts(path, options.each)]

    config = ServeConfig(
        model=ModelConfig(options.target, options.drafter, dtype=options.dtype),
        engine=EngineConfig(policy=options.policy, max_requests=8),
        gateway=GatewayConfig(http_port=options.http_port, grpc_port=options.grpc_port),
    )
    with LocalCluster(config, console.print) as cluster:
        answers = ask(cluster.grpc_address, options.target, texts, options.tokens)
        plain = None
        if options.dtype != "float32":
            plain = ask(cluster.grpc_address, options.target, texts, options.tokens, False)

    console.print("comparing …")
    tokenizer = load_tokenizer(options.target)
    model = AutoModelForCausalLM.from_pretrained(resolve_target(options.target), dtype="float32")
    eos = model.generation_config.eos_token_id
    reference = GreedyReference(model, tuple(eos) if isinstance(eos, list) else (eos,))
    comparisons = []
    for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )
        prompt = encoded["input_ids"]
        want = plain[i]["token_ids"] if plain else reference.tokens(prompt, options.tokens)
        comparisons.append(reference.compare(prompt, answer["token_ids"], want, options.dtype))
    return report(texts, answers, comparisons)


def ask(
    address: str, target: str, texts: list[str], tokens: int, speculate: bool = True
) -> list[dict]:
    with InferenceClient(address) as client, ThreadPoolExecutor(8) as pool:

        def one(text: str) -> dict:
            token_ids: list[int] = []
            request = chat_request(
                target, [("user", text)], max_tokens=tokens, temperature=0.0, speculate=speculate
            )
            for part in client.generate(request):
                token_ids += part.token_ids
            stats = part.speculation
            return {
                "token_ids": token_ids,
                "drafted": stats.drafted_tokens,
                "verified": stats.verified_tokens,
                "accepted": stats.accepted_tokens,
            }

        return list(pool.map(one, texts))


def report(texts: list[str], answers: list[dict], comparisons: list) -> int:
    """JSON on stdout; 0 only when all is lossless and drafting took part."""
    counts = {key: sum(a[key] for a in answers) for key in ("drafted", "verified", "accepted")}
    parted = [
        {"prompt": text[:80], **asdict(comparison)}
        for text, comparison in zip(texts, comparisons, strict=True)
        if comparison.diverges_at is not None
    ]
    lossless = all(comparison.lossless for comparison in comparisons)
    conclusive = min(counts.values()) > 0
    verdict = "INCONCLUSIVE" if not conclusive else "lossless" if lossless else "NOT lossless"
    result = {
        "verdict": verdict,
        "prompts": len(texts),
        "tokens_compared": sum(comparison.length for comparison in comparisons),
        **counts,
        "diverged": parted,
        **provenance(),
    }
    print(json.dumps(result, indent=2))
    return 0 if verdict == "lossless" else 1


if __name__ == "__main__":
    sys.exit(main())
