"""The drafter's forward on many anchors at once, given the true tokens.

Every anchor brings a block that sees the context before its anchor and its own block, nothing else:
as one session does when serving. The anchors of a conversation share one sequence, and a mask tells
their blocks apart, so the context's keys and values are neither computed nor stored twice.

Shape symbols: A anchors, γ block size, Q rows of a block, N = A·γ rows that predict, C
conversations, B blocks of the conversation that has most, W context rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dspark.kernels.transfer import to_device
from dspark.models.drafter import DSparkDrafter
from dspark.training.capture import Captured, Rows
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
    anchors: torch.Tensor,  # [A] rows of `captured`, on the host
) -> ForcedBlocks:
    """Teacher-forced blocks at `anchors`."""
    size, device = drafter.config.block_size, captured.tokens.device
    of = captured.rows.conversations
    offset = torch.arange(size)
    where = anchors[:, None] + offset  # [A, γ] the place before each draft token's
    inside = where.clamp(max=len(of) - 1)
    own = (of[inside] == of[anchors][:, None]) & (inside == where)
    inside, own = to_device([inside, own.to(torch.int64)], device)
    hidden = drafter.predicting(_hidden(drafter, captured, anchors))
    # Draft token k stands at anchor+k+1 and is biased by the one at anchor+k.
    head = drafter.markov_head
    embedded = head.embed(captured.tokens[inside])
    logits = drafter.base_logits(hidden) + head.bias(head.codes(embedded, hidden))
    confidence_logits = drafter.confidence_logits(hidden, embedded, logits)
    law_rows = captured.law_rows[inside].flatten()
    at = law_rows.clamp(min=0)
    return ForcedBlocks(
        logits=logits.flatten(0, 1),
        confidence_logits=confidence_logits.flatten(),
        valid=own.flatten().bool() & (law_rows >= 0),
        law=TargetLaw(captured.law.probs[at], captured.law.outside[at]),
        choices=captured.choices[at],
        positions=offset.to(device).repeat(len(anchors)),
    )


def _hidden(
    drafter: DSparkDrafter, captured: Captured, anchors: torch.Tensor
) -> torch.Tensor:  # [A, Q, d]
    """Hidden states of the anchors' blocks, a conversation's side by side in one sequence."""
    rows, device = captured.rows, captured.tokens.device
    grid, places = _grid(rows, anchors)
    before = rows.positions[grid]  # [C, B] context rows that a block has
    width = int(before.max())
    seen = (grid[:, :1] - before[:, :1]) + torch.arange(width)  # [C, W] from each one's first row
    seen = seen.clamp(max=len(rows.positions) - 1)
    grid, places, before, seen = to_device([grid, places, before, seen], device)
    tokens = drafter.block_tokens(captured.tokens[grid], drafter.config.block_size)  # [C, B, Q]
    block = tokens.shape[-1]
    taps = captured.taps
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        taps = taps.to(drafter.fc.weight.dtype)  # otherwise autocast does, and to the smaller one
    features = drafter.feature_projection(taps)
    layers = [
        (_gather(keys, seen), _gather(values, seen))
        for keys, values in drafter.context_kv(features, captured.positions)
    ]
    hidden = drafter.hidden(
        tokens.flatten(1),
        (before[..., None] + torch.arange(block, device=device)).flatten(1),
        _Context(layers),
        _masks(drafter, before, width, block, layers[0][0].dtype),
    )
    return hidden.reshape(-1, block, hidden.shape[-1])[places]


def _grid(
    rows: Rows, anchors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:  # [C, B] rows, [A] where each anchor is in it, flattened
    """Anchors by conversation. Places that are left over take its first row, and harm nobody."""
    of, line = rows.conversations[anchors].unique(return_inverse=True)
    counts = line.bincount()
    order = line.argsort(stable=True)
    column = torch.empty_like(line)
    first = counts.cumsum(0) - counts
    column[order] = torch.arange(len(anchors)) - first[line[order]]
    starts = anchors - rows.positions[anchors]
    grid = torch.empty(len(of), int(counts.max()), dtype=torch.int64)
    grid[line] = starts[:, None]
    grid[line, column] = anchors
    return grid, line * grid.shape[1] + column


def _masks(
    drafter: DSparkDrafter,
    before: torch.Tensor,  # [C, B]
    width: int,  # W
    block: int,  # Q
    dtype: torch.dtype,
) -> list[torch.Tensor]:  # by layer, [C, 1, B·Q, W + B·Q] additive
    """A row sees its block, and the context before its anchor as far back as windows go."""
    conversations, blocks = before.shape
    place = torch.arange(width, device=before.device)
    seen = place < before[..., None]  # [C, B, W]
    if drafter.config.context_window:
        seen &= place >= before[..., None] - drafter.config.context_window
    seen = seen.repeat_interleave(block, 1)  # [C, B·Q, W]
    one = torch.arange(blocks, device=before.device).repeat_interleave(block)
    same = (one == one[:, None]).expand(conversations, -1, -1)
    row = (before[..., None] + torch.arange(block, device=before.device)).flatten(1)
    masks = {}
    for window in set(drafter.windows):
        near = seen if window is None else seen & (place > row[..., None] - window)
        unseen = ~torch.cat([near, same], dim=-1)[:, None]
        mask = torch.zeros(unseen.shape, dtype=dtype, device=before.device)
        masks[window] = mask.masked_fill_(unseen, float("-inf"))
    return [masks[window] for window in drafter.windows]


def _gather(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[G, T, D] and [C, W] to [C, G, W, D]."""
    # index_select adds gradients up in place; plain indexing would sort them first
    picked = states.index_select(1, rows.flatten())
    return picked.view(len(states), *rows.shape, states.shape[-1]).transpose(0, 1)
