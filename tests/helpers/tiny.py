"""Tiny random models that still behave like models: attention matters, and no law is flat."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.tables import flat_table
from helpers.tokenizer import byte_level
from transformers import AutoConfig, AutoModelForCausalLM

from dspark.config import EngineConfig
from dspark.engine.autoregressive import AutoregressiveBlocks
from dspark.engine.draft_link import CATCH_UP_ROWS, DraftLink, DraftReplies, LocalDraftLink
from dspark.engine.drafting import DraftEngine
from dspark.engine.dspark_blocks import DSparkBlocks
from dspark.engine.lookup import PromptLookup
from dspark.engine.verifier import VerifierEngine
from dspark.models.checkpoint import save_drafter
from dspark.models.drafter import DrafterConfig, DSparkDrafter
from dspark.models.target import TargetModel
from dspark.scheduling.calibration import CalibrationInUse, CalibrationTable
from dspark.types import (
    BlockProposal,
    DraftWork,
    Request,
    Scale,
    Scales,
    StepPlan,
    VerificationPolicy,
    VerificationResult,
)

TAPS = (0, 1)
# Rows cost nothing and drafting next to nothing: what a plan admits hangs on its ceiling alone, and
# not on how fast this machine drafts.
FREE_ROWS = flat_table((1, 64), (1, 5), ((1e6, 1e6), (1e6, 1e6)))
_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def hf_model(family: str = "llama", vocab: int = 32, seed: int = 0, **extra: Any) -> Any:
    """A random causal LM of transformers, fp32, untouched by us."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**_SHAPE, "vocab_size": vocab, **extra})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.25)
    return model.eval()


def tiny_target(family: str = "llama", vocab: int = 32, seed: int = 0, **extra: Any) -> TargetModel:
    """The same model behind our pages."""
    return TargetModel(hf_model(family, vocab, seed, **extra), TAPS)


def tiny_drafter(
    target: TargetModel,
    block_size: int = 4,
    seed: int = 1,
    draft_vocab: int = 0,
    window: int = 0,
    rank: int = 8,
    head: str = "vanilla",
    confidence: bool = True,
    from_anchor: bool = True,
    **shape: Any,
) -> DSparkDrafter:
    """A random drafter for a tiny target."""
    torch.manual_seed(seed)
    size = draft_vocab or target.vocab_size
    backbone = {key: value for key, value in _SHAPE.items() if key != "num_hidden_layers"}
    config = DrafterConfig(
        block_size=block_size,
        target_layer_ids=TAPS,
        mask_token_id=target.vocab_size - 1,
        markov_rank=rank,
        target_hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        draft_vocab_size=size,
        context_window=window,
        markov_head_type=head,
        enable_confidence_head=confidence,
        confidence_head_with_markov=confidence and rank > 0,
        sample_from_anchor=from_anchor,
        backbone={
            "model_type": target.config.model_type,
            "num_hidden_layers": 2,
            **backbone,
            **shape,
        },
    )
    ids = torch.randperm(target.vocab_size)[:size].sort().values
    drafter = DSparkDrafter(config, target.embed_weight, target.lm_head_weight, ids)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.2)
    return drafter.for_inference(torch.float32)


def tiny_causal_drafter(vocab: int = 32, like: int = 0, apart: float = 0.05) -> TargetModel:
    """A causal LM that nearly agrees with the tiny target of seed `like`, its layers one fewer."""
    model = hf_model(vocab=vocab, seed=like)
    torch.manual_seed(99)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += apart * torch.randn_like(parameter)
    model.model.layers = model.model.layers[:-1]
    model.config.num_hidden_layers -= 1
    return TargetModel(model)


def autoregressive_link(model: TargetModel, num_pages: int = 64) -> LocalDraftLink:
    """A causal LM as a drafter in this process."""
    return LocalDraftLink(DraftEngine(AutoregressiveBlocks(model), num_pages))


def save_models(folder: Path, block_size: int = 4) -> tuple[Path, Path]:
    """A target with its tokenizer, and a drafter, as users have them: two folders."""
    tokenizer = byte_level()
    model = hf_model(vocab=len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    drafter = tiny_drafter(TargetModel(model, TAPS), block_size)
    save_drafter(drafter, folder / "drafter", torch.float32)
    return folder / "target", folder / "drafter"


def tiny_engine(
    target: TargetModel,
    drafter: DSparkDrafter | None = None,
    *,
    link: DraftLink | None = None,
    lookup: PromptLookup | None = None,
    block_size: int = 4,  # without a drafter
    **settings: Any,
) -> VerifierEngine:
    """A verifier engine over tiny models; fixed blocks unless told otherwise."""
    if drafter is not None and link is None:
        link = LocalDraftLink(DraftEngine(DSparkBlocks(drafter), num_pages=64))
    config = EngineConfig(**{"policy": "fixed", "cache_tokens": 2048, **settings})
    return VerifierEngine(
        target,
        config,
        projection=None if drafter is None else drafter.feature_projection,
        link=link,
        lookup=lookup,
        block_size=block_size if drafter is None else drafter.config.block_size,
    )


class ScriptedLink:
    """A drafter that knows each request's continuation, and corrupts some of what it says."""

    latency_s = deadline_s = 0.0
    catch_up_rows = CATCH_UP_ROWS

    def __init__(self, continuations: dict[str, list[int]], vocab: int, wrong: float = 0.2) -> None:
        self._continuations, self._vocab, self._wrong = continuations, vocab, wrong
        self._rng = np.random.default_rng(0)
        self._ready: list[BlockProposal] = []
        self.available = True
        self.freed: list[str] = []

    def submit(self, works: Sequence[DraftWork]) -> None:
        for work in works:
            if not work.block_size:
                continue
            start = work.fence.committed_len
            true = self._continuations[work.fence.session][start : start + work.block_size]
            tokens = np.array([*true, *[0] * (work.block_size - len(true))], dtype=np.int64)
            wrong = self._rng.random(len(tokens)) < self._wrong
            tokens[wrong] = self._rng.integers(0, self._vocab, int(wrong.sum()))
            confidences = np.full(len(tokens), 1 - self._wrong, dtype=np.float32)
            self._ready.append(BlockProposal(work.fence, tokens, confidences))

    def free(self, sessions: Iterable[str]) -> None:
        self.freed.extend(sessions)

    def collect(self, wait_s: float) -> DraftReplies:
        ready, self._ready = self._ready, []
        return DraftReplies(ready)

    def missed(self, sessions: Iterable[str]) -> None:
        raise AssertionError("nothing is ever under way")


class RecordingLink(LocalDraftLink):
    """A drafter in this process; keeps every block, by request and committed length."""

    def __init__(self, drafter: DSparkDrafter, num_pages: int = 64) -> None:
        self.engine = DraftEngine(DSparkBlocks(drafter), num_pages)
        super().__init__(self.engine)
        self.blocks: dict[tuple[str, int], list[int]] = {}

    def collect(self, wait_s: float) -> DraftReplies:
        replies = super().collect(wait_s)
        for proposal in replies.proposals:
            key = proposal.fence.session, proposal.fence.committed_len
            self.blocks[key] = proposal.token_ids.tolist()
        return replies


class Tally:
    """Tokens by request, and what drafting did."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.results: list[VerificationResult] = []

    @property
    def drafted(self) -> int:
        return sum(r.drafted for r in self.results)

    @property
    def verified(self) -> int:
        return sum(r.verified for r in self.results)

    @property
    def accepted(self) -> int:
        return sum(r.accepted for r in self.results)

    def add(self, results: Iterable[VerificationResult]) -> None:
        for result in results:
            self.results.append(result)
            self.tokens.setdefault(result.request_id, []).extend(result.token_ids)


def run(
    engine: VerifierEngine,
    requests: Sequence[Request],
    budget_seed: int | None = None,
    *,
    recalibrated: bool = False,
) -> Tally:
    """Generate to the end; with a budget seed, another verification budget at every step.

    `recalibrated`: and other scales, too.
    """
    tally = Tally()
    budgets = None
    if budget_seed is not None:
        budgets = random.Random(budget_seed)
        engine.table = FREE_ROWS
    for request in requests:
        engine.add(request)
    while engine.has_work:
        if budgets is not None:
            engine.set_plan(random_plan(budgets))
        if budgets is not None and recalibrated:
            engine.calibration = random_calibration(budgets)
        tally.add(engine.step())
    return tally


def random_plan(budgets: random.Random) -> StepPlan:
    """Anything that a scheduler may ask for, drawn without a look at the tokens."""
    return StepPlan(
        policy=budgets.choice(list(VerificationPolicy)),
        block_size=budgets.randint(0, 4),
        max_draft_tokens=budgets.choice([0, 1, 3, 7, 30, 100]),
        draft_by_request=budgets.random() < 0.5,
        valid_for_s=3600.0,  # what lapses by the clock hangs on how busy the machine is
    )


def random_calibration(budgets: random.Random) -> CalibrationInUse:
    """Scales that earlier traffic may have brought, drawn without a look at the tokens."""

    def scale() -> Scale:
        temperatures = tuple(2.0 ** budgets.uniform(-3, 3) for _ in range(4))
        return Scale(temperatures, tuple(budgets.uniform(-2, 2) for _ in range(4)))

    return CalibrationInUse(4, "w", CalibrationTable(Scales(scale(), scale()), 4, "w", 1000))
