"""Where a drafter starts: with what can be known before the first update.

Three things take a short run most of its time to find out, and can be computed instead:

- which token follows which: the Markov head (dspark.training.bigrams);
- the scale of the target's LM head: the final norm;
- that the newest context matters most. From random weights, attention over the context is uniform,
  its gradients are tiny, and a drafter stays a bigram model for thousands of updates. Some heads of
  the first layer start as recency heads instead: with queries and keys of a constant direction a,
  rotary embedding makes the score at distance δ equal to Σ_f a_f² cos(θ_f δ), which peaks at δ = 0
  and, with a on the fast frequencies only, falls off within a few tokens.

All of it is a start: every weight is trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dspark.models.drafter import DSparkDrafter
from dspark.models.families import family
from dspark.models.sequential_head import MarkovHead
from dspark.models.target import TargetModel
from dspark.training.bigrams import bigram_factors
from dspark.training.capture import Rows, capture
from dspark.training.text import Conversation

_FIRST_NORM = 0.3  # of the target's: an untrained backbone should not drown the bigrams
_RECENCY_SHARE = 2 / 3  # of the first layer's heads
_RECENCY_SHARPNESS = (4.0, 8.0, 16.0)  # taken in turn by the heads
_FAST_FREQUENCIES = 10
_SAMPLE = 12  # conversations that show what features look like
_RIDGE = 1e-2


@torch.no_grad()
def start(
    drafter: DSparkDrafter,
    target: TargetModel,
    conversations: Sequence[Conversation],
    max_tokens: int,
) -> None:
    """Set the weights that need not be learnt."""
    config = drafter.config
    offset = family(config.backbone["model_type"]).norm_offset
    drafter.norm.weight.copy_(_FIRST_NORM * (target.final_norm_weight + offset) - offset)
    if isinstance(drafter.markov_head, MarkovHead):
        factors = bigram_factors(
            conversations, drafter.draft_token_ids, config.vocab_size, config.markov_rank
        )
        drafter.markov_head.start_from(*factors)
    rows = Rows.of(conversations[:_SAMPLE], max_tokens)
    captured = capture(target, rows, drafter.draft_token_ids)
    taps = captured.taps.to(drafter.fc.weight.dtype)
    _recency_heads(drafter, drafter.feature_projection(taps).float())


def _recency_heads(drafter: DSparkDrafter, features: torch.Tensor) -> None:  # [T, d]
    layer = drafter.layers[0]
    attention = layer.self_attn
    if attention.v_proj is None:
        return  # a key that is the same for all context would be its value as well
    tokens = torch.cat(
        [
            drafter.draft_token_ids,
            drafter.draft_token_ids.new_tensor([drafter.config.mask_token_id]),
        ]
    )
    inputs = layer.input_layernorm(drafter.embed(tokens)).float()
    # A direction in which every block row looks the same, and one in which every context row does
    # and no block row does.
    query = _direction(inputs, torch.ones(len(inputs), device=inputs.device))
    both = torch.cat([features, inputs])
    is_context = torch.zeros(len(both), device=both.device)
    is_context[: len(features)] = 1.0
    key = _direction(both, is_context)
    width = attention.head_dim
    shape = torch.zeros(width, device=query.device)
    shape[: min(_FAST_FREQUENCIES, width // 2)] = 1.0  # the cosine half of each rotary pair
    heads = attention.q_proj.out_features // width
    groups = attention.k_proj.out_features // width
    for head in range(int(_RECENCY_SHARE * heads)):
        group = head * groups // heads
        scale = (_RECENCY_SHARPNESS[group % len(_RECENCY_SHARPNESS)]) ** 0.5
        rows_q = slice(head * width, (head + 1) * width)
        rows_k = slice(group * width, (group + 1) * width)
        attention.q_proj.weight[rows_q] += scale * torch.outer(shape, query)
        attention.k_proj.weight[rows_k] = scale * torch.outer(shape, key)


def _direction(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Ridge regression: u with rows · u ≈ wanted."""
    gram = rows.T @ rows
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    out: torch.Tensor = torch.linalg.solve(gram, rows.T @ wanted)
    return out
