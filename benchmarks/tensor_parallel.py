"""A target split over two processes: what it says, how long its steps take, and what a death does.

    python benchmarks/tensor_parallel.py --device cuda
    python benchmarks/tensor_parallel.py --device cuda --model qwen3-8b --parts say,time
    python benchmarks/tensor_parallel.py --device cpu --model tiny

say: the same prompts and steps run on the whole target and on the split one; logits must agree up
to the rounding of bf16. time: steps of both, from a plan on the host until the device is done.
lose: the other process is killed, between two steps and within one; whoever runs steps must be told
and must get an UnavailableError. On GPUs the processes add up over NCCL, else over gloo. The model
is random, in bf16, and written to a temporary folder, which both are loaded from as an engine does.

Needs a checkout, torch, transformers, safetensors, numpy and PyYAML; dspark need not be installed.
"""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu_step_floor import MODELS, QWEN3
from transformers import AutoConfig, AutoModelForCausalLM

from dspark.config import ModelConfig
from dspark.engine.assembly import load_target
from dspark.engine.profiling import step_batch
from dspark.errors import DSparkError, UnavailableError
from dspark.kernels.attention_plan import Pages, pages_for, plan_attention
from dspark.models.drafter_folder import NO_DRAFTER
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetBatch, TargetModel

SHAPES: dict[str, dict[str, Any]] = {
    **{name: {**QWEN3, **shape} for name, shape in MODELS.items()},
    "tiny": {**QWEN3, "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512,
             "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
             "head_dim": 32, "tie_word_embeddings": True},
}  # fmt: skip
PARTS = ("say", "time", "lose")
PROMPT, CONTEXT, SEQUENCES = 64, 256, 8
STEPS = ((1, 1), (1, 8), (8, 8))  # requests, rows of each, over CONTEXT
TIMED = ((1, 1), (8, 1), (8, 8), (32, 8))
TIMED_CONTEXT = 1024
MOST_DIFFERENCE = 3e-2  # of logits, over the largest
_WARM_UPS = 4  # kernels are compiled, and steps captured
_TOLD_S = 90.0
_STEPS_BEFORE = 20  # that the killed process took part in
_END_S = 30.0
_LOAD_S = 300.0

Logits = dict[str, torch.Tensor]  # [N, V] fp32, by step


# -- loading --------------------------------------------------------------------------------------


def write_model(name: str, folder: Path, device: str) -> None:
    """A random one, whose layers say as much whatever their width.

    With weights as wide as transformers draws them, rounding grows from layer to layer: at the
    width of 8B, bfloat16 is 7e-2 of the largest logit from fp32, split or whole.
    """
    torch.manual_seed(0)
    shape = SHAPES[name]
    spread = min(0.02, 0.02 * (1024 / shape["hidden_size"]) ** 0.5)
    with torch.device(device):
        config = AutoConfig.for_model("qwen3", **shape, initializer_range=spread)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def load(folder: Path, device: str, parts: int) -> TargetModel:
    return load_target(
        ModelConfig(target=str(folder), drafter=NO_DRAFTER, device=device, tensor_parallel=parts)
    ).target


def drop(target: TargetModel) -> None:
    """End its processes; its memory goes when nobody holds it."""
    target.close()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait_for_device(target: TargetModel) -> None:
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)


def graphs(target: TargetModel, kv: PagedKVCache) -> str:
    """Whether steps over this cache were replayed as CUDA graphs."""
    if target.padded is None:
        return "no CUDA graphs: its steps are not padded"
    if target.padded.failed:
        return "no CUDA graphs: a capture failed"
    if target.device.type != "cuda":
        return "no CUDA graphs: padded steps on another device"
    return f"{target.padded.graphs(kv)} CUDA graphs"


# -- say ------------------------------------------------------------------------------------------


class Texts:
    """Random texts on pages of their own, the same for every target of a vocabulary."""

    def __init__(self, target: TargetModel) -> None:
        generator = torch.Generator().manual_seed(1)
        longest = CONTEXT + max(rows for _, rows in STEPS)
        self._tokens = torch.randint(
            0, target.vocab_size, (SEQUENCES, longest), generator=generator
        )
        each = pages_for(longest)
        shuffled = torch.randperm(SEQUENCES * each, generator=generator).numpy().astype("int32") + 1
        self._pages: list[Pages] = [shuffled[s * each : (s + 1) * each] for s in range(SEQUENCES)]
        self._target, self.kv = target, PagedKVCache(SEQUENCES * each + 1, target.device)

    def run(self, requests: int, rows: int, start: int, *, last: bool = False) -> torch.Tensor:
        """Logits of the rows after `start`, or of the last of each request."""
        plan = plan_attention(
            self._pages[:requests], [start] * requests, [rows] * requests, self._target.device
        )
        wanted = torch.arange(requests * rows)
        if last:
            wanted = wanted[rows - 1 :: rows]
        tokens = self._tokens[:requests, start : start + rows].flatten()
        return self._on_host(self._target.forward(TargetBatch(tokens, plan, wanted), self.kv))

    def whole(self, lengths: tuple[int, ...]) -> torch.Tensor:
        """Logits of texts from their first token on, which keep nothing."""
        texts = [row[:length] for row, length in zip(self._tokens, lengths, strict=False)]
        return self._on_host(self._target.forward_whole(texts, torch.arange(sum(lengths))))

    def _on_host(self, out: Any) -> torch.Tensor:
        logits: torch.Tensor = out.logits.float().cpu()
        self._target.check()
        return logits


def say(target: TargetModel) -> tuple[Logits, str]:
    """What it says of every step, and whether graphs did."""
    texts = Texts(target)
    said = {f"prompt of {PROMPT}": texts.run(1, PROMPT, 0)}
    said[f"prompts of {CONTEXT}"] = texts.run(SEQUENCES, CONTEXT, 0, last=True)
    for requests, rows in STEPS:
        # a second time, which is when what was captured at the first is replayed
        for turn in ("", ", again"):
            name = f"{requests}x{rows} over {CONTEXT}{turn}"
            said[name] = texts.run(requests, rows, CONTEXT)
    said["whole texts of 64 and 20"] = texts.whole((64, 20))
    return said, graphs(target, texts.kv)


def agree(whole: Logits, split: Logits) -> bool:
    """Print how far they are apart; whether that is near enough."""
    good = True
    for name, want in whole.items():
        got = split[name]
        difference = float((got - want).abs().max() / want.abs().max())
        same = float((got.argmax(-1) == want.argmax(-1)).float().mean())
        near = bool(torch.isfinite(got).all()) and difference <= MOST_DIFFERENCE
        print(f"say   {name}: difference {difference:.2e} of the largest logit "
              f"({float(want.abs().max()):.2f}), same argmax {same:.1%} of {len(want)} rows"
              f"{'' if near else ' FAILED'}", flush=True)  # fmt: skip
        good = good and near
    return good


# -- time -----------------------------------------------------------------------------------------


def step_times(target: TargetModel, repeats: int) -> tuple[list[float], str]:
    """Median ms of each of TIMED, and whether graphs were used."""
    found, used = [], set()
    pages = pages_for(TIMED_CONTEXT)
    for requests, rows in TIMED:
        kv, times = PagedKVCache(requests * pages + 1, target.device), []
        for _ in range(_WARM_UPS + repeats):
            batch = step_batch(target, requests, rows, TIMED_CONTEXT, pages)
            wait_for_device(target)
            started = time.perf_counter()
            target.forward(batch, kv)
            wait_for_device(target)
            times.append((time.perf_counter() - started) * 1e3)
        found.append(statistics.median(times[_WARM_UPS:]))
        used.add(graphs(target, kv))
    return found, "; ".join(sorted(used))


def times_without_graphs(target: TargetModel, repeats: int) -> list[float]:
    padded, target.padded = target.padded, None
    try:
        return step_times(target, repeats)[0]
    finally:
        target.padded = padded


# -- lose -----------------------------------------------------------------------------------------


def lose(folder: Path, device: str, within: bool) -> bool:
    """Kill the other process; whether the surviving one was told, and raised, in time.

    All in a process of its own, since one that waits on a GPU may hang for good, or be aborted.
    """
    where = "within a step" if within else "between steps"
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    survivor = spawn.Process(target=survive, args=(folder, device, within, theirs))
    survivor.start()
    theirs.close()
    heard: list[str] = []
    deadline = time.monotonic() + _LOAD_S
    with suppress(EOFError):
        while not {"told", "raised"} <= set(heard) and ours.poll(deadline - time.monotonic()):
            what, seconds, error, text = ours.recv()
            if what == "killed":
                deadline = time.monotonic() + _TOLD_S
                print(f"lose  {where}: {text}", flush=True)
                continue
            expected = error == UnavailableError.__name__ and seconds <= _TOLD_S
            heard.append(what if expected else f"{what} something else")
            print(f"lose  {where}: {what} after {seconds:.3f} s, {error}: {text}", flush=True)
    survivor.join(_END_S)
    if survivor.exitcode is None:
        survivor.kill()
        survivor.join()
        print(f"lose  {where}: the survivor had to be killed", flush=True)
    elif survivor.exitcode:
        print(f"lose  {where}: the survivor ended with status {survivor.exitcode}", flush=True)
    good = {"told", "raised"} <= set(heard)
    if not good:
        missing = {"told", "raised"} - set(heard)
        print(f"lose  {where}: FAILED: not {' and not '.join(sorted(missing))} as it should be")
    return good


def survive(folder: Path, device: str, within: bool, tell: Connection) -> None:
    """Rank 0: step, kill rank 1, and report (what, seconds since, error, its text)."""
    log_plainly()
    target = load(folder, device, 2)
    told, lock = threading.Event(), threading.Lock()
    killed_at = 0.0

    def report(what: str, error: BaseException) -> None:
        with lock:
            seconds = time.monotonic() - killed_at
            tell.send((what, seconds, type(error).__name__, str(error)))

    def lost(error: DSparkError) -> None:
        report("told", error)
        told.set()

    target.on_lost(lost)
    requests, rows = STEPS[-1]
    pages = pages_for(CONTEXT)
    kv, steps = PagedKVCache(requests * pages + 1, target.device), 0
    ready = threading.Event()

    def step() -> None:
        nonlocal steps
        target.forward(step_batch(target, requests, rows, CONTEXT, pages), kv).logits.cpu()
        target.check()
        steps += 1

    def run(forever: Callable[[], bool]) -> None:
        try:
            while forever():
                if steps == _STEPS_BEFORE:
                    ready.set()
                step()
        except Exception as error:
            report("raised", error)
            ready.set()

    assert target._ranks is not None
    (pid,) = target._ranks.pids
    if within:
        stepping = threading.Thread(target=run, args=(lambda: True,), daemon=True)
        stepping.start()
        ready.wait()
    else:
        while steps < _STEPS_BEFORE:
            step()
    with lock:
        tell.send(("killed", 0.0, "", f"process {pid} is killed after {steps} steps"))
        killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
    if within:
        stepping.join()
    else:
        told.wait()
        run(lambda: True)
    told.wait()
    target.close()


# -- all ------------------------------------------------------------------------------------------


def log_plainly() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")


def describe(device: str) -> str:
    if device != "cuda":
        return f"CPU, torch {torch.__version__}, gloo"
    names = [torch.cuda.get_device_name(i) for i in range(2)]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return f"{' and '.join(names)}, torch {torch.__version__}, NCCL {nccl}"


def compare(folder: Path, device: str, parts: list[str], repeats: int) -> bool:
    """Run the whole target, then the split one; whether they agree."""
    said: list[Logits] = []
    times: list[list[float]] = []
    plain: list[float] = []
    # One after the other: a GPU need not hold both, and no graph is captured beside the sums.
    for count, name in ((1, "whole"), (2, "split")):
        started = time.perf_counter()
        target = load(folder, device, count)
        print(f"load  {name}: {time.perf_counter() - started:.1f} s, "
              f"{'our' if target.fused else 'transformers'} layers", flush=True)  # fmt: skip
        if "say" in parts:
            logits, used = say(target)
            said.append(logits)
            print(f"say   {name}: {used}", flush=True)
        if "time" in parts:
            found, used = step_times(target, repeats)
            times.append(found)
            print(f"time  {name}: {used}", flush=True)
            if count == 1 and target.padded is not None:
                plain = times_without_graphs(target, repeats)
        drop(target)
        del target
        gc.collect()
    for i, (requests, rows) in enumerate(TIMED if times else ()):
        whole, split = times[0][i], times[1][i]
        beside = f", whole without graphs {plain[i]:.2f} ms" if plain else ""
        print(f"time  {requests}x{rows} at {TIMED_CONTEXT}: whole {whole:.2f} ms, split "
              f"{split:.2f} ms, ratio {split / whole:.2f}{beside}", flush=True)  # fmt: skip
    return not said or agree(*said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--parts", default=",".join(PARTS), help="of say, time and lose")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of a kind")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts must be of {', '.join(PARTS)}; got {options.parts!r}")
    if options.device == "cuda" and torch.cuda.device_count() < 2:
        sys.exit(f"two GPUs are needed and {torch.cuda.device_count()} are seen: "
                 "--device cpu --model tiny tries it out")  # fmt: skip
    log_plainly()
    print(f"{options.model}, {describe(options.device)}", flush=True)
    good = True
    with tempfile.TemporaryDirectory(prefix="dspark-tensor-parallel-") as name:
        folder = Path(name)
        started = time.perf_counter()
        write_model(options.model, folder, options.device)
        gc.collect()
        print(f"model written in {time.perf_counter() - started:.1f} s", flush=True)
        if "say" in parts or "time" in parts:
            good = compare(folder, options.device, parts, options.repeats)
        if "lose" in parts:
            drills = [lose(folder, options.device, within) for within in (False, True)]
            good = good and all(drills)
    print("all good" if good else "FAILED")
    sys.exit(not good)


if __name__ == "__main__":
    main()
