"""A step on a CUDA device: what it says, when it waits, and how long it takes.

Checks that captured steps say what steps as they are say; that judging on the device comes to the
host's verdicts; that a step waits for the device where it must and nowhere else; that greedy output
is the target's own, drafted or not; and that a model which cannot be captured runs without. Times
steps with and without graphs. All models are random, and made here.

    python3 benchmarks/cuda_step.py --output cuda_step.json

Needs a checkout, torch, transformers, numpy and PyYAML; dspark need not be installed.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dspark.config import EngineConfig
from dspark.engine import drafting
from dspark.engine import judge as judging
from dspark.engine.draft_link import CATCH_UP_ROWS, DraftLink, DraftReplies, LocalDraftLink
from dspark.engine.drafting import DraftEngine
from dspark.engine.dspark_blocks import DSparkBlocks
from dspark.engine.judge import Judged, judge
from dspark.engine.profiling import step_batch
from dspark.engine.verifier import VerifierEngine
from dspark.evaluation.provenance import provenance
from dspark.kernels.attention_plan import pages_for, plan_attention
from dspark.models.drafter import DrafterConfig, DSparkDrafter
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetBatch, TargetModel, TargetOutput
from dspark.types import BlockProposal, DraftWork, Fence, Request, SamplingParams, VerifyMode

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SMALL: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 2048, "tie_word_embeddings": True, **NO_TOKENS,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 24},
    "gemma2": {"sliding_window": 24, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 64},
}
_QWEN3: dict[str, Any] = {
    "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8,
    "max_position_embeddings": 40960, "tie_word_embeddings": True, **NO_TOKENS,
}  # fmt: skip
TIMED: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {**_QWEN3, "hidden_size": 1024, "intermediate_size": 3072,
                   "num_hidden_layers": 28, "num_attention_heads": 16},
    "qwen3-4b": {**_QWEN3, "hidden_size": 2560, "intermediate_size": 9728,
                 "num_hidden_layers": 36, "num_attention_heads": 32},
}  # fmt: skip
CONTEXTS = (256, 1024)
CELLS = (*((t, 1) for t in (1, 2, 4, 8, 16, 32, 64)), *((t, 8) for t in (1, 2, 4, 8)))
TAPS = (0, 2)
# Rows of four sequences: prompts, before there is memory; then shapes that come again with other
# tokens, so that graphs are replayed on what they were not captured with; then prompts that go on.
STEPS = (
    (20, 33, 17, 40), (1, 1, 1, 1), (5, 1, 2, 8), (1, 1, 1, 1), (8, 8, 8, 8), (3, 7, 2, 4),
    (0, 1, 0, 1), (1, 1, 1, 1), (8, 8, 8, 8), (1, 0, 9, 0), (0, 16, 0, 3), (1, 1, 1, 1),
    (90, 3, 60, 1), (70, 1, 70, 12),
)  # fmt: skip
KINDS = (
    SamplingParams(temperature=0.0, max_tokens=24),
    SamplingParams(temperature=0.8, max_tokens=24),
    SamplingParams(top_k=20, max_tokens=24),
    SamplingParams(top_p=0.8, top_k=5000, max_tokens=24),
    SamplingParams(top_p=0.9, max_tokens=24, mode=VerifyMode.COUPLED),
    SamplingParams(max_tokens=24, speculate=False),
)
Facts = dict[str, Any]


class CheckError(AssertionError):
    """A check that does not hold."""


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise CheckError(what)


# -- models and caches ----------------------------------------------------------------------------


def hf_model(family: str, dtype: torch.dtype, device: str, **extra: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES.get(family, {}), **extra})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.06)
    return model.to(device=device, dtype=dtype).eval()


def drafter_of(target: TargetModel, block_size: int = 4) -> DSparkDrafter:
    backbone = {**SMALL, "model_type": "qwen3", "num_hidden_layers": 2}
    backbone.pop("vocab_size")
    config = DrafterConfig(
        block_size=block_size,
        target_layer_ids=TAPS,
        mask_token_id=target.vocab_size - 1,
        markov_rank=32,
        target_hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        draft_vocab_size=target.vocab_size,
        context_window=0,
        backbone=backbone,
    )
    torch.manual_seed(1)
    head, embedding = (t.cpu() for t in (target.lm_head_weight, target.embed_weight))
    drafter = DSparkDrafter(config, embedding, head, torch.arange(target.vocab_size))
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.06)
    return drafter.for_inference(target.dtype, str(target.device))


def engine_of(
    target: TargetModel, drafter: DSparkDrafter | None = None, link: DraftLink | None = None
) -> VerifierEngine:
    if drafter is not None and link is None:
        drafts = DraftEngine(DSparkBlocks(drafter), num_pages=513)
        drafts.warm_up()
        link = LocalDraftLink(drafts)
    engine = VerifierEngine(
        target,
        EngineConfig(policy="fixed", cache_tokens=8192, prefix_cache=False, check_pages=True),
        projection=None if drafter is None else drafter.feature_projection,
        link=link,
        block_size=0 if drafter is None else drafter.config.block_size,
    )
    engine.warm_up()
    return engine


class Cache:
    """Four sequences on pages of their own, and what has been run of each."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self._tokens = torch.randint(0, vocabulary, (4, 256), generator=generator)
        shuffled = torch.randperm(64, generator=generator).numpy().astype("int32") + 1
        self._pages = [shuffled[s * 16 : (s + 1) * 16] for s in range(4)]
        self.kv = PagedKVCache(65, device)
        self._done = [0] * 4

    def step(self, target: TargetModel, rows: tuple[int, ...]) -> TargetOutput:
        active = [s for s, n in enumerate(rows) if n]
        starts = [self._done[s] for s in active]
        counts = [rows[s] for s in active]
        for s, n in zip(active, counts, strict=True):
            self._done[s] += n
        plan = plan_attention([self._pages[s] for s in active], starts, counts, target.device)
        spans = zip(active, starts, counts, strict=True)
        tokens = torch.cat([self._tokens[s, a : a + n] for s, a, n in spans])
        return target.forward(TargetBatch(tokens, plan, torch.arange(len(tokens))), self.kv)


def outputs(target: TargetModel) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """Logits and taps of every step, in fp32, and how many graphs they took."""
    cache = Cache(target.vocab_size, target.device)
    outs = [cache.step(target, rows) for rows in STEPS]
    taps = [out.taps.float() for out in outs if out.taps is not None]
    held = 0 if target.padded is None else target.padded.graphs(cache.kv)
    return [out.logits.float() for out in outs], taps, held


@contextmanager
def as_it_is(target: TargetModel) -> Iterator[None]:
    """Steps are neither padded nor captured."""
    padded, target.padded = target.padded, None
    try:
        yield
    finally:
        target.padded = padded


def largest(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


# -- checks ---------------------------------------------------------------------------------------


def check_graphs_say_the_same(device: str) -> Facts:
    facts: Facts = {}
    for family in FAMILIES:
        model = hf_model(family, torch.float32, device)
        half = copy.deepcopy(model).to(torch.bfloat16)
        exact_half = copy.deepcopy(half).float()
        target = TargetModel(model, TAPS, padded=True)
        logits, taps, held = outputs(target)
        with as_it_is(target):
            plain_logits, plain_taps, _ = outputs(target)
        expect(held >= 5, f"{family}: {held} graphs were made of {len(STEPS) - 1} steps")
        # Kernels of other shapes sum in other orders, and attention may round its weights (TF32).
        # A key too many or too few, or a wrong position, changes logits by about their spread.
        spread = float(torch.cat(plain_logits).std())
        worst = largest(logits, plain_logits), largest(taps, plain_taps)
        tap_spread = float(torch.cat(plain_taps).std())
        expect(
            all(bool(torch.isfinite(x).all()) for x in (*logits, *taps)), f"{family}: not finite"
        )
        expect(worst[0] < 5e-3 * spread, f"{family}: fp32 logits differ by {worst[0]} of {spread}")
        expect(worst[1] < 5e-3 * tap_spread, f"{family}: taps differ by {worst[1]} of {tap_spread}")
        with as_it_is(reference := TargetModel(exact_half, TAPS)):
            exact = torch.cat(outputs(reference)[0])
        target = TargetModel(half, TAPS, padded=True)
        graphed = torch.cat(outputs(target)[0])
        with as_it_is(target):
            plain = torch.cat(outputs(target)[0])
        errors = float((graphed - exact).abs().mean()), float((plain - exact).abs().mean())
        # as near to fp32 as steps that run as they are
        expect(errors[0] < 1.3 * errors[1], f"{family}: bf16 is off by {errors}")
        facts[family] = {
            "graphs": held, "fp32_logits": worst[0], "fp32_taps": worst[1], "spread": spread,
            "bf16_error_graphs": errors[0], "bf16_error_plain": errors[1],
        }  # fmt: skip
    return facts


@contextmanager
def waiting_is_an_error() -> Iterator[Counter[str]]:
    """Whatever waits for the device raises, but `to_host`, whose calls are counted."""
    counts: Counter[str] = Counter()
    honest = judging.to_host

    def relaxed(name: str) -> Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]:
        def fetch(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            counts[name] += 1
            torch.cuda.set_sync_debug_mode("default")
            try:
                return honest(tensors)
            finally:
                torch.cuda.set_sync_debug_mode("error")

        return fetch

    with (
        patch.object(judging, "to_host", relaxed("judge")),
        patch.object(drafting, "to_host", relaxed("draft")),
    ):
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield counts
        finally:
            torch.cuda.set_sync_debug_mode("default")


def requests_of(kinds: Sequence[SamplingParams], vocabulary: int) -> list[Request]:
    generator = torch.Generator().manual_seed(2)
    prompts = [
        torch.randint(0, vocabulary, (n,), generator=generator).tolist()
        for n in (3, 40, 9, 70, 17, 1)
    ]
    return [
        Request(str(i), tuple(prompt), kinds[i % len(kinds)]) for i, prompt in enumerate(prompts)
    ]


def tokens_of(engine: VerifierEngine, requests: Iterable[Request]) -> tuple[Facts, Counter[str]]:
    """Tokens by request, and what drafting did."""
    made: dict[str, list[int]] = {}
    tally: Counter[str] = Counter()
    for request in requests:
        engine.add(request)
    while engine.has_work:
        tally["steps"] += 1
        for result in engine.step():
            made.setdefault(result.request_id, []).extend(result.token_ids)
            tally["verified"] += result.verified
            tally["accepted"] += result.accepted
    return made, tally


def check_a_step_waits_once(device: str) -> Facts:
    try:
        with waiting_is_an_error():
            torch.ones(1, device=device).item()
    except RuntimeError:
        pass
    else:
        raise CheckError("INCONCLUSIVE: torch does not notice that the host waits")
    facts: Facts = {}
    target = TargetModel(hf_model("qwen3", torch.bfloat16, device), TAPS, padded=True)
    assert target.padded is not None
    for drafts in (False, True):
        engine = engine_of(target, drafter_of(target) if drafts else None)
        requests = requests_of(KINDS, target.vocab_size)
        tokens_of(engine, requests)  # captures, and whatever else happens once
        made = target.padded.graphs(engine.kv)
        expect(made > 0 and not target.padded.failed, "nothing was captured")
        with waiting_is_an_error() as counts:
            _, tally = tokens_of(engine, requests)
        expect(not target.padded.failed, "a capture failed")
        expect(counts["judge"] <= tally["steps"], f"{counts} waits in {tally['steps']} steps")
        expect(counts["draft"] <= drafts * tally["steps"], f"{counts} in {tally['steps']} steps")
        expect(bool(tally["verified"]) is drafts, "INCONCLUSIVE: nothing was verified")
        facts["drafts" if drafts else "plain"] = {
            **tally, "waits": dict(counts), "graphs": made,
            "graphs_after": target.padded.graphs(engine.kv),
        }  # fmt: skip
    # A vocabulary of a real size takes other kernels.
    judged, logits = judged_of(24, 151_936, seed=3)
    far = logits.to(device)
    with waiting_is_an_error() as counts:
        judge(far, judged)
    expect(counts["judge"] == 1, f"{counts} waits of one judgement")
    return facts


def judged_of(requests: int, vocabulary: int, seed: int) -> tuple[list[Judged], torch.Tensor]:
    """Requests of all kinds with blocks drawn from laws on their likeliest tokens."""
    generator = torch.Generator().manual_seed(seed)
    judged, parts = [], []
    for i in range(requests):
        length = i % 5
        logits = torch.randn(length + 1, vocabulary, generator=generator) * 3
        ids = logits[:-1].topk(16).indices
        probs = torch.softmax(torch.randn(ids.shape, generator=generator), -1)
        fence = Fence(str(i), 0, seed, 30)
        proposal = None
        if length:
            drawn = ids.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]
            tokens = ids[:, 0] if i % 2 else drawn
            proposal = BlockProposal(
                fence, tokens.numpy(), np.ones(length, np.float32), ids.numpy(), probs.numpy()
            )
        kind = KINDS[i % len(KINDS)]
        sampling = SamplingParams(kind.temperature, kind.top_k, kind.top_p, 24, i, mode=kind.mode)
        judged.append(Judged(Request(str(i), (0,) * 30, sampling), fence, proposal, length))
        parts.append(logits)
    return judged, torch.cat(parts)


def check_the_device_judges_as_the_host(device: str) -> Facts:
    same = total = 0
    for seed, vocabulary in enumerate((50, 1024, 1024, 5000, 5000, 151_936)):
        judged, logits = judged_of(36, vocabulary, seed)
        with patch.object(judging, "_has_operator", lambda _: False):
            want = judge(logits, judged)
        got = judge(logits.to(device), judged)
        same += sum(a == b for a, b in zip(got, want, strict=True))
        total += len(want)
    # the two sum laws in other orders: a draw on the edge between two tokens may fall either way
    expect(same >= 0.98 * total, f"{same} of {total} verdicts are the same")
    return {"same": same, "of": total}


class KnowingLink:
    """A drafter that knows how each request goes on, and corrupts a fifth of what it says."""

    latency_s = deadline_s = 0.0
    catch_up_rows = CATCH_UP_ROWS
    available = True

    def __init__(self, texts: dict[str, list[int]], vocabulary: int) -> None:
        self._texts, self._vocabulary = texts, vocabulary
        self._random = np.random.default_rng(0)
        self._replies = DraftReplies()

    def submit(self, works: Sequence[DraftWork]) -> None:
        for work in works:
            start, size = work.fence.committed_len, work.block_size
            tokens = np.array(self._texts[work.fence.session][start : start + size], dtype=np.int64)
            wrong = self._random.random(len(tokens)) < 0.2
            tokens[wrong] = self._random.integers(0, self._vocabulary, int(wrong.sum()))
            if len(tokens):
                confidences = np.full(len(tokens), 0.8, dtype=np.float32)
                self._replies.proposals.append(BlockProposal(work.fence, tokens, confidences))

    def free(self, sessions: Iterable[str]) -> None:
        pass

    def collect(self, wait_s: float) -> DraftReplies:
        replies, self._replies = self._replies, DraftReplies()
        return replies

    def missed(self, sessions: Iterable[str]) -> None:
        pass


def check_greedy_output_is_the_targets(device: str) -> Facts:
    facts: Facts = {}
    sampling = SamplingParams(temperature=0.0, max_tokens=48)
    for family in ("llama", "qwen3", "gemma2"):
        model = hf_model(family, torch.float32, device)
        reference = copy.deepcopy(model)
        target = TargetModel(model, TAPS, padded=True)
        requests = requests_of([sampling], target.vocab_size)
        texts = {r.id: continued(reference, r) for r in requests}
        want = {r.id: texts[r.id][len(r.prompt_token_ids) :] for r in requests}
        drafter = drafter_of(target)
        plain, _ = tokens_of(engine_of(target), requests)
        drafted, tally = tokens_of(engine_of(target, drafter), requests)
        link = KnowingLink(texts, target.vocab_size)
        known, known_tally = tokens_of(engine_of(target, drafter, link), requests)
        expect(plain == want, f"{family}: differs from transformers: {plain} != {want}")
        expect(drafted == want, f"{family}: drafting changes it: {drafted} != {want}")
        expect(known == want, f"{family}: good drafts change it: {known} != {want}")
        expect(known_tally["accepted"] > 0, "INCONCLUSIVE: nothing was accepted")
        facts[family] = {"random": dict(tally), "knowing": dict(known_tally)}
    return facts


def continued(model: Any, request: Request) -> list[int]:
    ids = torch.tensor([request.prompt_token_ids], device=model.device)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=request.sampling.max_tokens,
    )
    return [int(token) for token in made[0].tolist()]


def check_what_cannot_be_captured_runs(device: str) -> Facts:
    model = hf_model("llama", torch.float32, device)
    target = TargetModel(model, TAPS, fused=False, padded=True)  # the modules are run
    with as_it_is(target):
        want = outputs(target)[0]
    mlp = model.model.layers[1].mlp
    honest = mlp.forward
    mlp.forward = lambda x: honest(x) if x.abs().max().item() >= 0 else x
    got, _, held = outputs(target)
    assert target.padded is not None
    expect(target.padded.failed and not held, "INCONCLUSIVE: it was captured")
    expect(largest(got, want) < 5e-3 * float(torch.cat(want).std()), "a failed capture left traces")
    return {}


# -- times ----------------------------------------------------------------------------------------


def times(device: str) -> list[Facts]:
    rows = []
    for name, shape in TIMED.items():
        config = AutoConfig.for_model("qwen3", **shape)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        target = TargetModel(model)
        most = max(requests for requests, _ in CELLS)
        kv = PagedKVCache(most * pages_for(max(CONTEXTS)) + 1, target.device)
        target.forward(step_batch(target, 1, 1, 16, 1), kv)  # the cache gets its memory
        for context in CONTEXTS:
            for requests, per_request in CELLS:
                cell = (requests, per_request, context)
                with as_it_is(target):
                    plain = timed(target, kv, *cell)
                graphs = timed(target, kv, *cell)
                expect(not getattr(target.padded, "failed", True), "a capture failed")
                rows.append(
                    {
                        "model": name, "context": context, "rows": requests * per_request,
                        "requests": requests, "rows_per_request": per_request,
                        "plain": plain, "graphs": graphs,
                    }
                )  # fmt: skip
                show(rows[-1], first=len(rows) == 1)
        del model, target, kv
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def timed(
    target: TargetModel, kv: PagedKVCache, requests: int, per_request: int, context: int
) -> Facts:
    """Milliseconds of forwards that follow each other, and of steps that wait for their verdicts.

    Both with all that the host does for them: the plan, the copies.
    """

    def forward() -> torch.Tensor:
        batch = step_batch(target, requests, per_request, context, pages_for(context))
        return target.forward(batch, kv).logits

    started = time.perf_counter()
    forward()
    torch.cuda.synchronize()
    first_ms = (time.perf_counter() - started) * 1e3
    for _ in range(4):
        forward()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    repeats = 20
    begin.record()
    for _ in range(repeats):
        forward()
    end.record()
    torch.cuda.synchronize()
    greedy = SamplingParams(temperature=0.0)
    asked = [
        Judged(Request(str(i), (0,), greedy), Fence(str(i), 0, 0, 1), None, 0)
        for i in range(requests * per_request)
    ]
    steps = []
    for _ in range(repeats):
        started = time.perf_counter()
        judge(forward(), asked)
        steps.append((time.perf_counter() - started) * 1e3)
    return {
        "first_ms": first_ms,
        "forward_ms": begin.elapsed_time(end) / repeats,
        "step_ms": statistics.median(steps),
        "reserved_mib": torch.cuda.memory_reserved() / 2**20,
    }


def show(row: Facts, first: bool) -> None:
    if first:
        print(f"{'model':>11} {'context':>7} {'rows':>9}  forward ms, plain -> graphs   step ms")
    plain, graphs = row["plain"], row["graphs"]
    rows = f"{row['requests']}x{row['rows_per_request']}"
    print(
        f"{row['model']:>11} {row['context']:>7} {rows:>9}  "
        f"{plain['forward_ms']:8.2f} -> {graphs['forward_ms']:7.2f}  "
        f"{plain['step_ms']:12.2f} -> {graphs['step_ms']:7.2f}  "
        f"{plain['step_ms'] / graphs['step_ms']:5.2f}x",
        flush=True,
    )


CHECKS: tuple[Callable[[str], Facts], ...] = (
    check_graphs_say_the_same,
    check_the_device_judges_as_the_host,
    check_a_step_waits_once,
    check_greedy_output_is_the_targets,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON with machine, commit and versions")
    parser.add_argument("--no-times", action="store_true", help="checks only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device here: nothing was checked, nothing was timed")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    result: Facts = {"checks": {}, "times": [], "cuda": torch.version.cuda, **provenance()}
    failed = 0
    # What cannot be captured comes last, since a failed capture is the one that could do harm.
    tasks: list[tuple[str, Callable[[], Any]]] = [
        (check.__name__, lambda check=check: check("cuda")) for check in CHECKS
    ]
    if not options.no_times:
        tasks.append(("times", lambda: times("cuda")))
    last = check_what_cannot_be_captured_runs
    tasks.append((last.__name__, lambda: last("cuda")))
    for name, task in tasks:
        started = time.perf_counter()
        try:
            facts, verdict = task(), "ok"
        except Exception:
            traceback.print_exc()
            facts, verdict, failed = traceback.format_exc(), "FAILED", failed + 1
        print(f"{verdict}: {name} ({time.perf_counter() - started:.1f} s)", flush=True)
        if name == "times":
            result["times"] = facts
        else:
            result["checks"][name] = {"ok": verdict == "ok", "facts": facts}
        if options.output:
            options.output.write_text(json.dumps(result, indent=2) + "\n")
    if not options.output:
        print(json.dumps(result, indent=2))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
