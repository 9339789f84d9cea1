"""The drafter's forward on many anchors at once, given the true tokens.

Every anchor brings a block that sees the context before its anchor and its own block,
nothing else: as one session does when serving. The keys and values of the context are computed once
for all conversations, and gathered for each anchor.

Shape symbols: A anchors, γ block size, W context rows that a block sees, N = A·γ rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dspark.models.drafter import DSparkDrafter
from dspark.training.capture import Captured
from dspark.training.losses import TargetLaw


@dataclass(frozen=True, slots=True)
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
    anchors: torch.Tensor,  # [A] rows of `captured`, of its `anchors`
) -> ForcedBlocks:
    """Teacher-forced blocks at `anchors`."""
    size, device = drafter.config.block_size, captured.tokens.device
    rows = drafter.config.rows(size)
    offset = torch.arange(size, device=device)
    where = anchors[:, None] + offset  # [A, γ] the place before each draft token's
    hidden = drafter.hidden(
        drafter.block_tokens(captured.tokens[anchors], size),
        captured.positions[anchors][:, None] + torch.arange(rows, device=device),
        *_seen_from(drafter, captured, anchors, rows),
    )
    hidden = drafter.predicting(hidden)
    # Draft token k stands at anchor+k+1 and is biased by the one at anchor+k.
    inside = where.clamp(max=len(captured.tokens) - 1).flatten()
    head = drafter.markov_head
    embedded = head.embed(captured.tokens[inside].view_as(where))
    logits = drafter.base_logits(hidden) + head.bias(head.codes(embedded, hidden))
    confidence_logits = drafter.confidence_logits(hidden, embedded, logits)
    own = captured.conversations[inside].view_as(where) == captured.conversations[anchors][:, None]
    law_rows = captured.law_rows[inside]
    at = law_rows.clamp(min=0)
    return ForcedBlocks(
        logits=logits.flatten(0, 1),
        confidence_logits=confidence_logits.flatten(),
        valid=own.flatten() & (law_rows >= 0) & (inside == where.flatten()),
        law=TargetLaw(captured.law.probs[at], captured.law.outside[at]),
        choices=captured.choices[at],
        positions=offset.repeat(len(anchors)),
    )


def _seen_from(
    drafter: DSparkDrafter, captured: Captured, anchors: torch.Tensor, rows: int
) -> tuple[_Context, list[torch.Tensor]]:
    """Keys and values [A, G, W, D] of the context, and masks [A, 1, rows, W + rows], by layer."""
    before = captured.positions[anchors]  # [A] rows of context that there are
    width = int(before.max())
    if drafter.config.context_window:
        width = min(width, drafter.config.context_window)
    back = torch.arange(width, 0, -1, device=anchors.device)
    missing = back > before[:, None]  # [A, W]
    seen = (anchors[:, None] - back).clamp(min=0)
    features = drafter.feature_projection(captured.taps)
    layers = [
        (_gather(keys, seen), _gather(values, seen))
        for keys, values in drafter.context_kv(features, captured.positions)
    ]
    mask = torch.zeros(
        len(anchors), 1, rows, width + rows, dtype=layers[0][0].dtype, device=anchors.device
    )
    mask[..., :width].masked_fill_(missing[:, None, None], float("-inf"))
    distance = back + torch.arange(rows, device=anchors.device)[:, None]  # [rows, W]
    masks: dict[int | None, torch.Tensor] = {None: mask}
    for window in {window for window in drafter.windows if window is not None}:
        masks[window] = mask.clone()
        masks[window][..., :width].masked_fill_(distance >= window, float("-inf"))
    return _Context(layers), [masks[window] for window in drafter.windows]


def _gather(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[G, T, D] and [A, W] to [A, G, W, D]."""
    # index_select adds gradients up in place; plain indexing would sort them first
    picked = states.index_select(1, rows.flatten())
    return picked.view(len(states), *rows.shape, states.shape[-1]).transpose(0, 1)
