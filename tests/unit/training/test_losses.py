"""The fused objective against autograd on its definition."""

from __future__ import annotations

import pytest
import torch

from dspark.training.losses import TargetLaw, confidence_loss, draft_loss, restrict


def plain(
    logits: torch.Tensor, law: TargetLaw, weight: torch.Tensor, ce_weight: float, tv_weight: float
) -> torch.Tensor:
    log_p = torch.log_softmax(logits, -1)
    ce = -(law.probs * log_p).sum(-1)
    tv = 0.5 * ((log_p.exp() - law.probs).abs().sum(-1) + law.outside)
    return (weight * (ce_weight * ce + tv_weight * tv)).sum()


@pytest.mark.parametrize(("ce_weight", "tv_weight"), [(0.1, 0.9), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_value_and_gradient_are_those_of_the_definition(
    ce_weight: float, tv_weight: float, scale: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(7, 50, generator=generator) * 3
    law = restrict(full, torch.arange(0, 50, 2))
    weight = torch.rand(7, generator=generator)
    logits = (torch.randn(7, 25, generator=generator) * scale).requires_grad_()
    twin = logits.detach().clone().requires_grad_()
    loss, tv = draft_loss(logits, law, weight, ce_weight=ce_weight, tv_weight=tv_weight)
    want = plain(twin, law, weight, ce_weight, tv_weight)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    (3 * loss).backward()
    (3 * want).backward()
    torch.testing.assert_close(logits.grad, twin.grad, rtol=1e-4, atol=1e-6)
    assert ((tv >= 0) & (tv <= 1 + 1e-6)).all()


def test_mass_that_cannot_be_drafted_counts_against_acceptance() -> None:
    law = restrict(torch.zeros(1, 4), torch.tensor([0, 1]))
    assert law.outside.item() == pytest.approx(0.5)
    _, tv = draft_loss(torch.zeros(1, 2), law, torch.ones(1), ce_weight=0.0, tv_weight=1.0)
    assert tv.item() == pytest.approx(0.5)  # p = (½, ½) against t = (¼, ¼) and ½ outside


def test_confidence_is_least_where_it_equals_the_chance_of_acceptance() -> None:
    tv = torch.tensor([0.3])
    at = [
        confidence_loss(torch.logit(torch.tensor([c])), tv, torch.ones(1)).item()
        for c in (0.6, 0.7, 0.8)
    ]
    assert min(at) == at[1]
