"""The drafter's forward on many anchors of one conversation at once, given the true tokens.

Every anchor brings a block of γ rows that sees the context before its anchor and its own block,
nothing else. One conversation is one attention problem: keys are its T feature rows and then all
blocks, and a mask says who sees what.

Shape symbols: A anchors, γ block size, T tokens of the conversation, N = A·γ rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dspark.models.drafter import DSparkDrafter
from dspark.training.capture import Captured
from dspark.training.losses import TargetLaw


@dataclass(slots=True)
class _Context:
    layers: list[tuple[torch.Tensor, torch.Tensor]]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layers[index]


@dataclass(frozen=True, slots=True)
class ForcedBlocks:
    """The drafter's output on N rows, and what the target says of the same positions."""

    logits: torch.Tensor  # [N, V_d]
    confidence_logits: torch.Tensor  # [N]
    valid: torch.Tensor  # [N] bool; False past the conversation's end
    law: TargetLaw  # [N, V_d]
    choices: torch.Tensor  # [N] the target's most likely token
    positions: torch.Tensor  # [N] 0-based place in the block


def force(
    drafter: DSparkDrafter,
    captured: Captured,
    anchors: torch.Tensor,  # [A] positions, each at or after captured.first
) -> ForcedBlocks:
    """Teacher-forced blocks at `anchors`."""
    size, device = drafter.config.block_size, captured.tokens.device
    length, count = len(captured.tokens), len(anchors)
    offset = torch.arange(size, device=device)
    where = anchors[:, None] + offset  # [A, γ] position of each row; it predicts the next one
    features = drafter.feature_projection(captured.taps)
    context = drafter.context_kv(features[None], torch.arange(length, device=device)[None])
    blocks = drafter.block_tokens(captured.tokens[anchors], size).view(1, -1)
    hidden = drafter.hidden(
        blocks,
        where.view(1, -1),
        _Context(context),
        _mask(anchors, length, size, drafter.config.context_window, context[0][0].dtype),
    )[0]
    # Row k of a block predicts position anchor+k+1 and is biased by the token at anchor+k.
    inside = where.clamp(max=length - 1).flatten()
    embedded = drafter.markov_head.embed(captured.tokens[inside])
    rows = (inside - captured.first).clamp(max=len(captured.choices) - 1)
    return ForcedBlocks(
        logits=drafter.base_logits(hidden) + drafter.markov_head.bias(embedded),
        confidence_logits=drafter.confidence_head(hidden, embedded),
        valid=(where < length - 1).flatten(),
        law=TargetLaw(captured.law.probs[rows], captured.law.outside[rows]),
        choices=captured.choices[rows],
        positions=offset.repeat(count),
    )


def _mask(
    anchors: torch.Tensor, length: int, size: int, window: int, dtype: torch.dtype
) -> torch.Tensor:  # [1, 1, N, T + N]
    device = anchors.device
    block = torch.arange(len(anchors), device=device).repeat_interleave(size)
    own = anchors[block][:, None]
    position = torch.arange(length, device=device)
    past = position < own
    if window:
        past &= position >= own - window
    same = block[:, None] == block
    seen = torch.cat([past, same], dim=1)
    mask = torch.zeros(seen.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~seen, float("-inf"))[None, None]
