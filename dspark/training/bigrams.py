"""What counting alone tells of the text: the draft vocabulary, and a start for the Markov head.

Trained from random factors, the Markov head spends most of a short run on finding out which token
follows which. Counts say it at once: with M the smoothed pointwise mutual information of adjacent
tokens, the head starts at the best rank-r approximation of M, W1 W2 ≈ M, rows weighted by how often
they are used. Symbols as in dspark.models.drafter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dspark.training.text import Conversation

_SMOOTHING = 2.0  # unseen continuations a token is credited with, spread by their frequency
_OVERSAMPLING = 16
_ITERATIONS = 3


def common_tokens(
    conversations: Sequence[Conversation], count: int, vocab_size: int
) -> torch.Tensor:
    """The `count` most frequent answer tokens, rising: the draft vocabulary."""
    if count >= vocab_size:
        return torch.arange(vocab_size)
    counts = torch.bincount(_flat(conversations), minlength=vocab_size)
    return counts.sort(descending=True, stable=True).indices[:count].sort().values


def bigram_factors(
    conversations: Sequence[Conversation],
    draft_token_ids: torch.Tensor,  # [V_d]
    vocab_size: int,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # W1 [V, r], W2 [V_d, r]
    """Factors of the bigram table: W1[a] · W2[b] ≈ log p(b | a)."""
    draft_of = torch.full((vocab_size,), -1, dtype=torch.int64)
    draft_of[draft_token_ids.cpu()] = torch.arange(len(draft_token_ids))
    size = len(draft_token_ids)
    pairs = torch.cat([_pairs(c, draft_of, size) for c in conversations])
    codes, counts = pairs.unique(return_counts=True)
    before, after = codes // size, codes % size
    seen = counts.double()
    total_before = torch.zeros(vocab_size, dtype=torch.float64).index_add_(0, before, seen)
    share = torch.zeros(size, dtype=torch.float64).index_add_(0, after, seen) / seen.sum()
    likely = (seen + _SMOOTHING * share[after]) / (total_before[before] + _SMOOTHING)
    information = torch.log(likely / share[after])
    weight = total_before.sqrt()
    matrix = torch.sparse_coo_tensor(
        torch.stack([before, after]),
        (information * weight[before]).float(),
        (vocab_size, size),
        check_invariants=False,
    )
    width = min(rank - 1, vocab_size, size)
    u, s, v = torch.svd_lowrank(
        matrix, q=min(width + _OVERSAMPLING, vocab_size, size), niter=_ITERATIONS
    )
    root = s[:width].sqrt()
    w1 = torch.zeros(vocab_size, rank)
    w2 = torch.zeros(size, rank)
    w1[:, :width] = u[:, :width] * root / weight.clamp(min=1.0)[:, None].float()
    w2[:, :width] = v[:, :width] * root
    # one scale on both sides, so that one learning rate suits them
    balance = (w2.norm() / w1.norm().clamp(min=1e-6)).sqrt()
    w1, w2 = w1 * balance, w2 / balance
    w1[:, -1] = 1.0
    w2[:, -1] = torch.log(share.clamp(min=0.5 / float(seen.sum()))).float()
    return w1, w2


def _flat(conversations: Sequence[Conversation]) -> torch.Tensor:
    return torch.tensor([t for c in conversations for t in c.answer], dtype=torch.int64)


def _pairs(conversation: Conversation, draft_of: torch.Tensor, size: int) -> torch.Tensor:
    """Adjacent tokens of an answer, coded as before · V_d + after, where `after` can be drafted."""
    answer = torch.tensor(conversation.answer, dtype=torch.int64)
    after = draft_of[answer[1:]]
    kept = after >= 0
    return answer[:-1][kept] * size + after[kept]
