"""What training holds in memory, without training: shapes only, on torch's meta device.

The drafter's forward runs on tensors without storage, and torch tells which of them the backward
pass would need. What the target needs is counted: its weights, and the largest of what one forward
makes. Sizes are of one worker, and depend on the configuration alone, not on how long it runs.

Symbols: T rows of text, N of them with a law, V vocabulary, V_d draft vocabulary, m tapped layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dspark.models.drafter import DrafterConfig, DSparkDrafter
from dspark.models.target_ends import empty_target
from dspark.training.capture import Captured, Rows
from dspark.training.losses import ROWS_AT_A_TIME, TargetLaw, draft_loss
from dspark.training.teacher_forcing import force
from dspark.training.text import Conversation
from dspark.training.trainer import TrainConfig

_HALF, _FULL = 2, 4  # bytes of a bf16 and a float32 value


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by what they are for."""

    parts: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """All of them, as if all were held at once."""
        return sum(self.parts.values())


def training_memory(
    target: str, shape: DrafterConfig, config: TrainConfig, workers: int = 1
) -> Memory:
    """Of one of `workers`, with conversations as long as `config` lets them be.

    `target` is a folder or a Hugging Face id, of which only the configuration is read.
    CheckpointError if there is none.
    """
    model = empty_target(target)
    text = model.config.get_text_config()
    texts = max(1, config.conversations_per_step // workers)
    conversation = Conversation((0,), (0,) * (config.max_tokens - 1), 1.0)
    rows = Rows.of([conversation] * texts, config.max_tokens)
    most = config.anchors_per_update // workers
    drawn = torch.randperm(len(rows.anchors), generator=torch.Generator().manual_seed(0))
    anchors = rows.anchors[drawn[: most * config.updates_per_step]]
    judged = rows.drafted_from(anchors, shape.block_size)
    with torch.device("meta"):
        ends = torch.empty(text.vocab_size, text.hidden_size, dtype=torch.bfloat16)
        ids = torch.empty(shape.draft_vocab_size, dtype=torch.int64)
        drafter = DSparkDrafter(shape, ends, ends, ids)
    tokens, law_rows = len(rows.positions), len(judged)
    logits = law_rows * text.vocab_size * _HALF
    softmax = 2 * min(law_rows, ROWS_AT_A_TIME) * text.vocab_size * _FULL
    widest = tokens * (2 * text.intermediate_size + 4 * text.hidden_size) * _HALF
    weights = _bytes(drafter)
    return Memory(
        {
            "target: weights, bf16": sum(p.numel() for p in model.parameters()) * _HALF,
            "target: its forward": max(widest, logits + softmax),
            "captured: tapped states": tokens * drafter.fc.in_features * _HALF,
            "captured: the target's law": law_rows * (shape.draft_vocab_size + 1) * _FULL,
            "drafter: float32 weights": weights,
            "drafter: their average": weights if config.average_decay else 0,
            "drafter: AdamW's moments": 2 * weights,
            "drafter: gradients": weights,
            "drafter: bf16 copies of the weights": weights // 2,
            "drafter: LM head": shape.draft_vocab_size * text.hidden_size * _HALF,
            "drafter: kept for backward": _kept(drafter, config, rows, anchors[:most], judged),
        }
    )


def _kept(
    drafter: DSparkDrafter,
    config: TrainConfig,
    rows: Rows,
    anchors: torch.Tensor,
    judged: torch.Tensor,
) -> int:
    """Bytes of what one update's forward leaves for its backward, weights apart."""
    law_rows = torch.full_like(rows.positions, -1)
    law_rows[judged] = torch.arange(len(judged))
    count, size = len(judged), drafter.config.draft_vocab_size
    with torch.device("meta"):
        captured = Captured(
            rows=rows,
            tokens=torch.empty(len(rows.positions), dtype=torch.int64),
            positions=torch.empty(len(rows.positions), dtype=torch.int64),
            taps=torch.empty(len(rows.positions), drafter.fc.in_features, dtype=torch.bfloat16),
            law_rows=torch.empty(len(rows.positions), dtype=torch.int64),
            law=TargetLaw(torch.empty(count, size), torch.empty(count)),
            choices=torch.empty(count, dtype=torch.int64),
        )
    drafter = drafter.to(torch.bfloat16)  # as autocast, which knows no meta device, has it
    held = {id(p.untyped_storage()) for p in drafter.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in held:
            seen[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        blocks = force(drafter, captured, anchors)
        ones = torch.ones(len(blocks.valid), device="meta")
        draft_loss(
            blocks.logits,
            blocks.law,
            ones,
            ce_weight=config.ce_weight,
            tv_weight=config.tv_weight,
        )
    return sum(storage.nbytes() for storage in seen.values())


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
