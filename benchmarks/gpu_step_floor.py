"""A captured decoding step on a GPU against the time that reading the weights alone would take.

    python benchmarks/gpu_step_floor.py [--models qwen3-0.6b,qwen3-4b,qwen3-8b] [--modules]

The floor is the bytes of all weights that a step reads (the embedding's rows aside) over the rate
of a large copy, measured in the same run. Models are random, in bf16. --modules: transformers' own
modules in place of our loop, attention and all else being the same. --batch-invariant: with
products that sum every row in one order.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dspark.engine.profiling import step_batch
from dspark.kernels.attention_plan import pages_for
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetModel

QWEN3: dict[str, Any] = {
    "vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40_960, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "tie_word_embeddings": True},
    "qwen3-4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "tie_word_embeddings": True},
    "qwen3-8b": {"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "tie_word_embeddings": False},
}  # fmt: skip
# requests, rows of each, context
CELLS = ((1, 1, 256), (1, 8, 256), (8, 1, 1024), (8, 8, 1024), (32, 1, 1024), (32, 8, 1024))
_REPEATS = 15


def copy_rate() -> float:
    """Bytes a second, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2.0 * source.numel() / statistics.median(times) * 1e3


def step_ms(target: TargetModel, cell: tuple[int, int, int]) -> float:
    """Until the GPU is done, from a plan on the host."""
    requests, rows, context = cell
    pages = pages_for(context)
    kv = PagedKVCache(requests * pages + 1, "cuda")
    times = []
    for _ in range(_REPEATS + 4):
        batch = step_batch(target, requests, rows, context, pages)
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.forward(batch, kv)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[4:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--modules", action="store_true")
    parser.add_argument("--batch-invariant", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device here: steps are timed on a GPU only")
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {rate / 1e12:.2f} TB/s")
    for name in options.models.split(","):
        config = AutoConfig.for_model("qwen3", **QWEN3, **MODELS[name])
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        target = TargetModel(
            model, fused=not options.modules, batch_invariant=options.batch_invariant
        )
        read = sum(p.numel() * p.element_size() for p in model.parameters())
        if not config.tie_word_embeddings:
            read -= model.get_input_embeddings().weight.numel() * 2
        floor = read / rate * 1e3
        for cell in CELLS:
            ms = step_ms(target, cell)
            print(f"{name} {cell[0]}x{cell[1]} at {cell[2]}: {ms:.2f} ms, floor {floor:.2f}, "
                  f"ratio {ms / floor:.2f}", flush=True)  # fmt: skip
        del target, model
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
