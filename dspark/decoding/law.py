"""From logits to the law that tokens are drawn from.

The same temperature, top-k and top-p go into the target's law p and the proposal's law q. q is cut
to a few candidates *before* anything is drawn from it, so the cut law is the proposal law and
rejection sampling against it is exact (design §3).

Order of the cuts, as in transformers: temperature, then top-k (ties with the k-th value stay), then
top-p (the smallest set of most likely tokens whose mass reaches p).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Top-p needs the tokens in order, but a full sort of the vocabulary costs more than the forward
# of a small model. Nearly always the nucleus lies within this many tokens; if not, sort all.
_NUCLEUS_GUESS = 1024


@dataclass(frozen=True, slots=True)
class Cuts:
    """What of the rules has to be known before anything is computed: read on the host."""

    most_k: int  # the largest top-k that cuts anything; 0: none does
    nucleus: torch.Tensor  # int64: rows with a top-p below 1

    @classmethod
    def of(cls, top_k: torch.Tensor, top_p: torch.Tensor, vocabulary: int) -> Cuts:
        """The cuts that the rules of N rows ask for."""
        cutting = top_k.masked_fill(top_k >= vocabulary, 0)
        return cls(max(cutting.tolist(), default=0), (top_p < 1.0).nonzero().flatten())


def target_law(
    logits: torch.Tensor,  # [N, V]
    temperature: torch.Tensor,  # [N] > 0
    top_k: torch.Tensor,  # [N] int64, 0 = off
    top_p: torch.Tensor,  # [N] in (0, 1]
    cuts: Cuts | None = None,  # where the rules lie on a GPU, which would have to be waited for
) -> torch.Tensor:  # [N, V] float32, rows sum to 1
    """The target's law after temperature, top-k and top-p."""
    cuts = cuts or Cuts.of(top_k, top_p, logits.shape[-1])
    scaled = logits.float() / temperature[:, None]
    scaled = _cut_top_k(scaled, top_k, cuts.most_k)
    probs = torch.softmax(scaled, dim=-1)
    return _cut_top_p(probs, top_p, cuts.nucleus)


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


def _cut_top_k(scaled: torch.Tensor, top_k: torch.Tensor, most: int) -> torch.Tensor:
    if not most:
        return scaled
    cuts = (top_k > 0) & (top_k < scaled.shape[-1])
    best = scaled.topk(most, dim=-1).values
    kth = best.gather(1, (top_k.clamp(1, most) - 1)[:, None])
    return scaled.masked_fill((scaled < kth) & cuts[:, None], float("-inf"))


def _cut_top_p(probs: torch.Tensor, top_p: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if rows.numel() == 0:
        return probs
    wanted = probs[rows]
    limit = top_p[rows, None]
    values, ids = _likeliest(wanted, limit)
    before = values.cumsum(dim=-1) - values
    before[:, 0] = -1.0  # the most likely token always stays, be the limit ever so small
    kept = values.masked_fill(before >= limit, 0.0)
    kept = kept / kept.sum(dim=-1, keepdim=True)
    out = probs.clone()
    out[rows] = torch.zeros_like(wanted).scatter_(1, ids, kept)
    return out


def _likeliest(
    probs: torch.Tensor,  # [n, V]
    mass: torch.Tensor,  # [n, 1]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely tokens, in order, as many as it takes for the mass: values and ids."""
    depth = min(_NUCLEUS_GUESS, probs.shape[-1])
    # A GPU sorts quickly, and would have to be waited for to learn whether the guess was enough.
    if probs.device.type == "cpu":
        values, ids = probs.topk(depth, dim=-1)
        if depth == probs.shape[-1] or bool((values.sum(dim=-1, keepdim=True) >= mass).all()):
            return values, ids
    return probs.sort(dim=-1, descending=True)
