"""Training a drafter: steps, schedule, held-out measures, and a state that survives a kill."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dspark.errors import ConfigError
from dspark.models.checkpoint import save_drafter
from dspark.models.drafter import DrafterConfig, DSparkDrafter
from dspark.models.target import TargetModel
from dspark.training.bigrams import common_tokens
from dspark.training.capture import Captured, capture
from dspark.training.losses import confidence_loss, draft_loss
from dspark.training.start import start
from dspark.training.teacher_forcing import force
from dspark.training.text import Conversation

STATE_FILE = "trainer.pt"
_HELD_OUT = 24  # conversations that are never trained on


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to train; the defaults are the paper's (§3.3) where it names one.

    A step is one forward of the target over some conversations, and several updates of the drafter
    on what that forward showed.
    """

    steps: int = 2000
    conversations_per_step: int = 4  # captured together by one forward of the target
    updates_per_step: int = 6  # of the drafter, each on other anchors of the same conversations
    anchors_per_update: int = 160
    max_tokens: int = 512
    learning_rate: float = 6e-4
    markov_lr_factor: float = 1.5  # its rows are each seen by few anchors
    warmup_share: float = 0.04
    ce_weight: float = 0.1
    tv_weight: float = 0.9
    confidence_weight: float = 1.0
    position_decay: float = 4.0
    save_every: int = 100
    evaluate_every: int = 200
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Measures:
    """Teacher-forced measures on held-out conversations, by block position."""

    acceptance: tuple[float, ...]  # mean 1 - TV
    agreement: tuple[float, ...]  # share of rows whose most likely token is the target's

    @property
    def greedy_length(self) -> float:
        """1 + Σ_j Π_{i≤j} agreement_i: a rough forecast of τ at temperature 0."""
        return 1.0 + sum(math.prod(self.agreement[: j + 1]) for j in range(len(self.agreement)))


class Trainer:
    """Owns drafter, optimiser and schedule. Goes on from `folder` when it holds a state."""

    def __init__(
        self,
        target: TargetModel,
        drafter_config: DrafterConfig,
        conversations: list[Conversation],
        config: TrainConfig,
        folder: Path,
    ) -> None:
        usable = [
            c for c in conversations if len(c.prompt) + 8 < config.max_tokens and len(c.answer) > 8
        ]
        if len(usable) <= 2 * _HELD_OUT:
            raise ConfigError(
                f"{len(usable)} usable conversations are too few to train and hold out "
                f"{_HELD_OUT}: write more text first (`dspark train --tokens`)"
            )
        self.target, self.config, self.folder = target, config, folder
        self._held_out, self._text = usable[:_HELD_OUT], usable[_HELD_OUT:]
        torch.manual_seed(config.seed)
        ids = common_tokens(self._text, drafter_config.draft_vocab_size, target.vocab_size)
        self.drafter = DSparkDrafter(
            drafter_config, target.embed_weight, target.lm_head_weight, ids.to(target.device)
        ).to(target.device)
        self.step = 0
        self._optimizer = self._make_optimizer()
        self._autocast = torch.autocast(target.device.type, dtype=torch.bfloat16)
        if not self._resume():
            start(self.drafter, target, self._text, config.max_tokens)

    def run(self, on_step: Callable[[int, float, Measures | None], None]) -> None:
        """Train to the last step; calls `on_step(step, loss, measures or None)`."""
        batches = self._batches()
        while self.step < self.config.steps:
            loss = self._train_step(next(batches))
            self.step += 1
            last = self.step == self.config.steps
            measures = None
            if self.step % self.config.evaluate_every == 0 or last:
                measures = self.evaluate()
            if self.step % self.config.save_every == 0 or last:
                self._save()
            on_step(self.step, loss, measures)

    @torch.no_grad()
    def evaluate(self) -> Measures:
        """Measure on the held-out conversations."""
        size = self.drafter.config.block_size
        accepted, agreed, seen = torch.zeros(size), torch.zeros(size), torch.zeros(size)
        per_step = self.config.conversations_per_step
        for first in range(0, len(self._held_out), per_step):
            captured = self._capture(self._held_out[first : first + per_step])
            # one anchor in four is enough to measure with
            with self._autocast:
                blocks = force(self.drafter, captured, captured.anchors[::4])
            ones = torch.ones(len(blocks.valid), device=blocks.logits.device)
            _, tv = draft_loss(blocks.logits, blocks.law, ones, ce_weight=0, tv_weight=1)
            hit = self.drafter.draft_token_ids[blocks.logits.argmax(dim=-1)] == blocks.choices
            for k in range(size):
                rows = blocks.valid & (blocks.positions == k)
                accepted[k] += (1.0 - tv[rows]).sum().cpu()
                agreed[k] += hit[rows].sum().cpu()
                seen[k] += rows.sum().cpu()
        return Measures(
            tuple((accepted / seen.clamp(min=1)).tolist()),
            tuple((agreed / seen.clamp(min=1)).tolist()),
        )

    def save_checkpoint(self, folder: Path) -> None:
        """Write the drafter as it is served: bf16."""
        save_drafter(self.drafter, folder, torch.bfloat16)

    # -- inside -------------------------------------------------------------------------------

    def _train_step(self, batch: list[Conversation]) -> float:
        """One capture and the updates it pays for; their mean loss."""
        config = self.config
        rng = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * self._schedule()
        captured = self._capture(batch)
        shuffled = captured.anchors[torch.randperm(len(captured.anchors), generator=rng)]
        updates = shuffled.split(config.anchors_per_update)[: config.updates_per_step]
        losses = [self._update(captured, anchors) for anchors in updates]
        return sum(losses) / max(1, len(losses))

    def _capture(self, batch: Sequence[Conversation]) -> Captured:
        return capture(self.target, batch, self.drafter.draft_token_ids, self.config.max_tokens)

    def _update(self, captured: Captured, anchors: torch.Tensor) -> float:
        """One optimiser update on blocks at the given anchors; the mean loss of a row."""
        config = self.config
        with self._autocast:
            blocks = force(self.drafter, captured, anchors)
        weight = torch.exp(-blocks.positions / config.position_decay) * blocks.valid
        weight /= weight.sum()
        loss, tv = draft_loss(
            blocks.logits,
            blocks.law,
            weight,
            ce_weight=config.ce_weight,
            tv_weight=config.tv_weight,
        )
        total = loss
        if self.drafter.confidence_head is not None:
            confidence = confidence_loss(blocks.confidence_logits, tv, weight)
            total = loss + config.confidence_weight * confidence
        self._optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), 1.0)
        self._optimizer.step()
        return float(total.detach())

    def _schedule(self) -> float:
        """Linear warm-up, then cosine to zero."""
        warmup = max(1, round(self.config.steps * self.config.warmup_share))
        if self.step < warmup:
            return (self.step + 1) / warmup
        progress = (self.step - warmup) / max(1, self.config.steps - warmup)
        return 0.5 * (1.0 + math.cos(math.pi * progress))

    def _batches(self) -> Iterator[list[Conversation]]:
        """Shuffled passes over the text, from where `self.step` stands; whole batches only."""
        per_step = min(self.config.conversations_per_step, len(self._text))
        per_epoch = len(self._text) // per_step
        for step in itertools.count(self.step):
            epoch, batch = divmod(step, per_epoch)
            order = list(range(len(self._text)))
            random.Random(f"{self.config.seed}/{epoch}").shuffle(order)
            start = batch * per_step
            yield [self._text[i] for i in order[start : start + per_step]]

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        markov = list(self.drafter.markov_head.parameters())
        fast = {id(p) for p in markov}
        rest = [p for p in self.drafter.parameters() if id(p) not in fast]
        groups: list[dict[str, Any]] = [
            {"params": rest, "peak_lr": config.learning_rate},
            {"params": markov, "peak_lr": config.learning_rate * config.markov_lr_factor},
        ]
        return torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / (STATE_FILE + ".partial")
        torch.save(
            {
                "step": self.step,
                "drafter": self.drafter.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "draft_token_ids": self.drafter.draft_token_ids,
            },
            partial,
        )
        partial.replace(self.folder / STATE_FILE)  # a kill leaves the old state or the new one

    def _resume(self) -> bool:
        path = self.folder / STATE_FILE
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.target.device, weights_only=True)
        if not torch.equal(state["draft_token_ids"], self.drafter.draft_token_ids):
            raise ConfigError(
                f"{path} was trained with another draft vocabulary: the text or --draft-vocab "
                "changed. Train into a new folder"
            )
        self.drafter.load_state_dict(state["drafter"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        return True
