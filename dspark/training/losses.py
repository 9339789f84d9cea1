"""The drafter's objective (paper §3.3), row by row, with its gradient written out.

For one draft position, with p the drafter's law on the draft vocabulary D and t the target's on V:

    CE = -Σ_{v∈D} t_v log p_v                        (against the law, not one token of it)
    TV = ½ (Σ_{v∈D} |p_v - t_v| + Σ_{v∉D} t_v)       1 - TV is the chance of acceptance
    ∂CE/∂z = p Σ_D t - t        ∂TV/∂z = ½ p ⊙ (s - Σ s p),  s = sign(p - t)

autograd would keep five copies of [N, V_d]; one fused pass keeps the gradient alone.
Shape symbols: N rows, V_d draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

ROWS_AT_A_TIME = 2048


@dataclass(frozen=True, slots=True)
class TargetLaw:
    """The target's law at the supervised rows, restricted to the draft vocabulary."""

    probs: torch.Tensor  # [N, V_d]
    outside: torch.Tensor  # [N] mass of tokens that cannot be drafted


def restrict(logits: torch.Tensor, draft_token_ids: torch.Tensor) -> TargetLaw:
    """Softmax over the whole vocabulary, kept on the draft vocabulary: [N, V] -> [N, V_d]."""
    # log_softmax is one fused pass; logsumexp on the CPU takes several times as long. In pieces,
    # since a large vocabulary in float32 is more than all else that training holds.
    parts = [
        torch.log_softmax(part.float(), dim=-1)[:, draft_token_ids].exp_()
        for part in logits.split(ROWS_AT_A_TIME)
    ]
    probs = torch.cat(parts)
    return TargetLaw(probs, (1.0 - probs.sum(dim=-1)).clamp_(min=0.0))


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,  # [N, V_d]
        target: torch.Tensor,  # [N, V_d]
        outside: torch.Tensor,  # [N]
        weight: torch.Tensor,  # [N]
        ce_weight: float,
        tv_weight: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = torch.log_softmax(logits.float(), dim=-1)
        target = target.float()
        ce = -(target * log_p).sum(dim=-1)
        p = log_p.exp_()
        gap = p - target
        tv = 0.5 * (gap.abs().sum(dim=-1) + outside)
        sign = gap.sign_()
        mean_sign = (sign * p).sum(dim=-1, keepdim=True)
        grad = sign.sub_(mean_sign).mul_(0.5 * tv_weight)
        grad.add_(target.sum(dim=-1, keepdim=True), alpha=ce_weight).mul_(p)
        grad.sub_(target, alpha=ce_weight).mul_(weight[:, None])
        ctx.save_for_backward(grad.to(logits.dtype))
        loss = (weight * (ce_weight * ce + tv_weight * tv)).sum()
        ctx.mark_non_differentiable(tv)
        return loss, tv

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None, None, None, None


def draft_loss(
    logits: torch.Tensor,  # [N, V_d]
    target: TargetLaw,
    weight: torch.Tensor,  # [N]
    *,
    ce_weight: float,
    tv_weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ weight · (ce_weight · CE + tv_weight · TV), and TV [N] without gradient."""
    loss, tv = _WeightedLoss.apply(  # type: ignore[no-untyped-call]
        logits, target.probs, target.outside, weight, ce_weight, tv_weight
    )
    return loss, tv


def confidence_loss(
    confidence_logits: torch.Tensor,  # [N]
    tv: torch.Tensor,  # [N]
    weight: torch.Tensor,  # [N]
) -> torch.Tensor:
    """Σ weight · BCE(σ(logit), 1 - TV)."""
    label = (1.0 - tv).clamp(0.0, 1.0).detach()
    bce = torch.nn.functional.binary_cross_entropy_with_logits(
        confidence_logits.float(), label, reduction="none"
    )
    return (weight * bce).sum()
