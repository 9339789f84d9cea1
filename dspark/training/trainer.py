"""Training a drafter: steps, schedule, held-out measures, and a state that survives a kill."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dspark.errors import ConfigError
from dspark.models.checkpoint import load_drafter, save_drafter
from dspark.models.drafter import DrafterConfig, DSparkDrafter
from dspark.models.target import TargetModel
from dspark.training.averaging import AveragedWeights
from dspark.training.bigrams import common_tokens
from dspark.training.capture import Captured, Rows, capture
from dspark.training.losses import confidence_loss, draft_loss
from dspark.training.peers import Peers
from dspark.training.start import start
from dspark.training.teacher_forcing import force
from dspark.training.text import Conversation

STATE_FILE = "trainer.pt"
_STATE = {"step", "drafter", "optimizer", "average", "draft_token_ids"}
_HELD_OUT = 24  # conversations that are never trained on
_SORTED_BATCHES = 16
# All but cuDNN's, which plans anew for each shape: no two batches have the same, and on an H100 its
# calls took half of a step.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to train; the defaults are the paper's (§3.3) where it names one.

    A step is one forward of the target over some conversations, and several updates of the drafter
    on what that forward showed. Counts are of all workers together.
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
    average_decay: float = 0.998  # a step of the optimiser; 0: no averaging
    save_every: int = 100
    evaluate_every: int = 200
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Measures:
    """Teacher-forced measures on held-out conversations, by block position; of the average."""

    acceptance: tuple[float, ...]  # mean 1 - TV
    agreement: tuple[float, ...]  # share of rows whose most likely token is the target's

    @property
    def greedy_length(self) -> float:
        """1 + Σ_j Π_{i≤j} agreement_i: a rough forecast of τ at temperature 0."""
        return 1.0 + sum(math.prod(self.agreement[: j + 1]) for j in range(len(self.agreement)))

    def summary(self, step: int) -> str:
        """One line for people."""
        shares = " ".join(f"{share:.3f}" for share in self.acceptance)
        return (
            f"step {step}: held-out acceptance by position {shares}, greedy forecast "
            f"τ {self.greedy_length:.2f}"
        )


def _bf16_pays(device: torch.device) -> bool:
    """Whether products in bf16, from float32 weights, are the faster ones."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"


class Trainer:
    """Owns drafter, optimiser and schedule. Goes on from `folder` when it holds a state.

    Where torch's default process group is set up, every worker of it makes a Trainer with the same
    arguments; `folder` is one that all of them reach.
    """

    def __init__(
        self,
        target: TargetModel,
        drafter_config: DrafterConfig,
        conversations: list[Conversation],
        config: TrainConfig,
        folder: Path,
        start_from: Path | None = None,
    ) -> None:
        """`start_from`: the checkpoint of a drafter of this shape, to go on from its weights."""
        usable = [
            c for c in conversations if len(c.prompt) + 8 < config.max_tokens and len(c.answer) > 8
        ]
        if len(usable) <= 2 * _HELD_OUT:
            raise ConfigError(
                f"{len(usable)} usable conversations are too few to train and hold out "
                f"{_HELD_OUT}: write more text first (`dspark train --tokens`)"
            )
        self.peers = Peers()
        for name in ("conversations_per_step", "anchors_per_update"):
            if getattr(config, name) % self.peers.count:
                raise ConfigError(
                    f"{name} is {getattr(config, name)}, which {self.peers.count} workers cannot "
                    "share evenly: choose a multiple of their number"
                )
        self.target, self.config, self.folder = target, config, folder
        self._held_out, self._text = usable[:_HELD_OUT], usable[_HELD_OUT:]
        torch.manual_seed(config.seed)
        begun = None if start_from is None else load_drafter(start_from, target)
        if begun is None:
            ids = common_tokens(self._text, drafter_config.draft_vocab_size, target.vocab_size)
        else:
            ids = begun.draft_token_ids
        self.drafter = DSparkDrafter(
            drafter_config, target.embed_weight, target.lm_head_weight, ids.to(target.device)
        ).to(target.device)
        self.step = 0
        self._optimizer = self._make_optimizer()
        self._autocast = torch.autocast(
            target.device.type, dtype=torch.bfloat16, enabled=_bf16_pays(target.device)
        )
        if not self._resume():
            if begun is None:
                start(self.drafter, target, self._text, config.max_tokens)
            else:
                self.drafter.load_state_dict(begun.state_dict())
            self.peers.agree(p.data for p in self.drafter.parameters())
            self._averaged = AveragedWeights(self.drafter, config.average_decay)

    def run(self, on_step: Callable[[int, float, Measures | None], None]) -> None:
        """Train to the last step; calls `on_step(step, loss, measures or None)`."""
        batches = self._batches()
        while self.step < self.config.steps:
            with sdpa_kernel(_ATTENTION):
                loss = self._train_step(next(batches))
            self.step += 1
            last = self.step == self.config.steps
            measures = None
            if self.step % self.config.evaluate_every == 0 or last:
                measures = self.evaluate()
            if self.step % self.config.save_every == 0 or last:
                self._save()
            on_step(self.step, loss, measures)

    @property
    def learning_rate(self) -> float:
        """Of the step that comes next: linear warm-up, then cosine to zero."""
        warmup = max(1, round(self.config.steps * self.config.warmup_share))
        if self.step < warmup:
            share = (self.step + 1) / warmup
        else:
            progress = (self.step - warmup) / max(1, self.config.steps - warmup)
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.config.learning_rate * share

    @torch.no_grad()
    def evaluate(self) -> Measures:
        """Measure on the held-out conversations."""
        size, device = self.drafter.config.block_size, self.target.device
        counts = torch.zeros(3, size, device=device)  # accepted, agreed, seen
        own = self._held_out[self.peers.rank :: self.peers.count]
        per_step = self.config.conversations_per_step
        with self._averaged.in_place(), self._autocast:
            for first in range(0, len(own), per_step):
                rows = Rows.of(own[first : first + per_step], self.config.max_tokens)
                anchors = rows.anchors[::4]  # enough to measure with
                captured = self._capture(rows, anchors)
                blocks = force(self.drafter, captured, anchors)
                ones = torch.ones(len(blocks.valid), device=device)
                _, tv = draft_loss(blocks.logits, blocks.law, ones, ce_weight=0, tv_weight=1)
                drafted = self.drafter.draft_token_ids[blocks.logits.argmax(dim=-1)]
                for into, of in zip(
                    counts, (1.0 - tv, drafted == blocks.choices, ones), strict=True
                ):
                    into.index_add_(0, blocks.positions, of.float() * blocks.valid)
        self.peers.add_up([counts])
        shares = counts[:2] / counts[2].clamp(min=1)
        return Measures(*map(tuple, shares.tolist()))

    def save_checkpoint(self, folder: Path) -> None:
        """Write the drafter as it is served: the averaged weights, in bf16."""
        if self.peers.first:
            with self._averaged.in_place():
                save_drafter(self.drafter, folder, torch.bfloat16)

    # -- inside -------------------------------------------------------------------------------

    def _train_step(self, batch: list[Conversation]) -> float:
        """One capture and the updates it pays for; their mean loss."""
        config, peers = self.config, self.peers
        rng = torch.Generator().manual_seed(
            (config.seed * 1_000_003 + self.step) * peers.count + peers.rank
        )
        rate = self.learning_rate
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        rows = Rows.of(batch[peers.rank :: peers.count], config.max_tokens)
        wanted = config.anchors_per_update // peers.count
        shuffled = rows.anchors[torch.randperm(len(rows.anchors), generator=rng)]
        # Workers must make as many updates, whatever their conversations hold: some then repeat.
        needed = wanted * config.updates_per_step
        if peers.count > 1 and len(shuffled) < needed:
            shuffled = shuffled.repeat(-(-needed // len(shuffled)))
        updates = shuffled[:needed].split(wanted)
        captured = self._capture(rows, shuffled[:needed])
        losses = [self._update(captured, anchors) for anchors in updates]
        return float(torch.stack(losses).mean())

    def _capture(self, rows: Rows, anchors: torch.Tensor) -> Captured:
        judged = rows.drafted_from(anchors, self.drafter.config.block_size)
        return capture(self.target, rows, self.drafter.draft_token_ids, judged)

    def _update(self, captured: Captured, anchors: torch.Tensor) -> torch.Tensor:
        """One optimiser update on blocks at the given anchors; the mean loss of a row."""
        config = self.config
        with self._autocast:
            blocks = force(self.drafter, captured, anchors)
        weight = torch.exp(-blocks.positions / config.position_decay) * blocks.valid
        weighed = weight.sum()
        self.peers.add_up([weighed])
        weight = weight / weighed
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
        reported = total.detach()
        gradients = [p.grad for p in self.drafter.parameters() if p.grad is not None]
        self.peers.add_up([*gradients, reported])
        torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), 1.0)
        self._optimizer.step()
        self._averaged.update()
        return reported

    def _batches(self) -> Iterator[list[Conversation]]:
        """Shuffled passes over the text, from where `self.step` stands; whole batches only."""
        per_step = min(self.config.conversations_per_step, len(self._text))
        per_epoch = len(self._text) // per_step
        first, skipped = divmod(self.step, per_epoch)
        for epoch in itertools.count(first):
            order = list(range(len(self._text)))
            random.Random(f"{self.config.seed}/{epoch}").shuffle(order)
            # Of like length, so that little is padding: sorted within a stretch, not over all.
            stretch = per_step * _SORTED_BATCHES
            for at in range(0, len(order), stretch):
                order[at : at + stretch] = sorted(
                    order[at : at + stretch], key=lambda i: len(self._text[i].answer)
                )
            batches = [order[i * per_step : (i + 1) * per_step] for i in range(per_epoch)]
            random.Random(f"{self.config.seed}/{epoch}/batches").shuffle(batches)
            for batch in batches[skipped if epoch == first else 0 :]:
                yield [self._text[i] for i in batch]

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        markov = list(self.drafter.markov_head.parameters())
        fast = {id(p) for p in markov}
        rest = [p for p in self.drafter.parameters() if id(p) not in fast]
        groups: list[dict[str, Any]] = [
            {"params": rest, "factor": 1.0},
            {"params": markov, "factor": config.markov_lr_factor},
        ]
        return torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    def _save(self) -> None:
        if self.peers.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / (STATE_FILE + ".partial")
            torch.save(
                {
                    "step": self.step,
                    "drafter": self.drafter.state_dict(),
                    "optimizer": self._optimizer.state_dict(),
                    "average": self._averaged.state(),
                    "draft_token_ids": self.drafter.draft_token_ids,
                },
                partial,
            )
            partial.replace(self.folder / STATE_FILE)  # a kill leaves the old state or the new one
        self.peers.wait()

    def _resume(self) -> bool:
        path = self.folder / STATE_FILE
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.target.device, weights_only=True)
        if state.keys() != _STATE:
            raise ConfigError(
                f"{path} holds {sorted(state)}, not {sorted(_STATE)}: another version wrote it. "
                "Train into a new folder"
            )
        if not torch.equal(state["draft_token_ids"], self.drafter.draft_token_ids):
            raise ConfigError(
                f"{path} was trained with another draft vocabulary: the text or --draft-vocab "
                "changed. Train into a new folder"
            )
        self.drafter.load_state_dict(state["drafter"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._averaged = AveragedWeights(self.drafter, self.config.average_decay)
        self._averaged.load(state["average"])
        self.step = state["step"]
        return True
