"""From logits to the law that tokens are drawn from.

The same temperature, top-k and top-p go into the target's law p and the proposal's law q. q is cut
to a few candidates *before* anything is drawn from it, so the cut law is the proposal law and
rejection sampling against it is exact (design §3).

Order of the cuts, as in transformers: temperature, then top-k (ties with the k-th value stay), then
top-p (the smallest set of most likely tokens whose mass reaches p).
"""

from __future__ import annotations

import torch

# Top-p needs the tokens in order, but a full sort of the vocabulary costs more than the forward
# of a small model. Nearly always the nucleus lies within this many tokens; if not, sort all.
_NUCLEUS_GUESS = 1024


def target_law(
    logits: torch.Tensor,  # [N, V]
    temperature: torch.Tensor,  # [N] > 0
    top_k: torch.Tensor,  # [N] int64, 0 = off
    top_p: torch.Tensor,  # [N] in (0, 1]
) -> torch.Tensor:  # [N, V] float32, rows sum to 1
    """The target's law after temperature, top-k and top-p."""
    scaled = logits.float() / temperature[:, None]
    scaled = _cut_top_k(scaled, top_k)
    probs = torch.softmax(scaled, dim=-1)
    return _cut_top_p(probs, top_p)


def proposal_law(
    logits: torch.Tensor,  # [N, V]
    candidates: int,
    temperature: torch.Tensor,  # [N] > 0
    top_k: torch.Tensor,  # [N] int64, 0 = off
    top_p: torch.Tensor,  # [N] in (0, 1]
) -> tuple[torch.Tensor, torch.Tensor]:  # ids [N, K] int64, probs [N, K] float32
    """The drafter's law on its K most likely tokens, most likely first; cut tokens have 0."""
    k = min(candidates, logits.shape[-1])
    values, ids = (logits.float() / temperature[:, None]).topk(k, dim=-1)
    rank = torch.arange(k, device=logits.device)
    beyond = (top_k[:, None] > 0) & (rank[None] >= top_k[:, None])
    probs = torch.softmax(values.masked_fill(beyond, float("-inf")), dim=-1)
    before = probs.cumsum(dim=-1) - probs
    probs = probs.masked_fill((before >= top_p[:, None]) & (rank > 0), 0.0)
    return ids, probs / probs.sum(dim=-1, keepdim=True)


def _cut_top_k(scaled: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    if not bool((top_k > 0).any()):
        return scaled
    vocabulary = scaled.shape[-1]
    effective = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary)
    limited = effective[effective < vocabulary]
    if limited.numel() == 0:
        return scaled
    best = scaled.topk(int(limited.max()), dim=-1).values
    kth = best.gather(1, (effective.clamp(max=best.shape[-1]) - 1)[:, None])
    cut = (scaled < kth) & (effective < vocabulary)[:, None]
    return scaled.masked_fill(cut, float("-inf"))


def _cut_top_p(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    rows = (top_p < 1.0).nonzero().flatten()
    if rows.numel() == 0:
        return probs
    wanted = probs[rows]
    limit = top_p[rows, None]
    depth = min(_NUCLEUS_GUESS, probs.shape[-1])
    values, ids = wanted.topk(depth, dim=-1)
    if depth < probs.shape[-1] and bool((values.sum(dim=-1, keepdim=True) < limit).any()):
        values, ids = wanted.sort(dim=-1, descending=True)
    before = values.cumsum(dim=-1) - values
    before[:, 0] = -1.0  # the most likely token always stays, be the limit ever so small
    kept = values.masked_fill(before >= limit, 0.0)
    kept = kept / kept.sum(dim=-1, keepdim=True)
    out = probs.clone()
    out[rows] = torch.zeros_like(wanted).scatter_(1, ids, kept)
    return out
