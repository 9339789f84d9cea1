"""Verdicts of dspark.decoding.acceptance, read back as the engine reads them."""

from __future__ import annotations

import torch

from dspark.decoding.acceptance import (
    Drafts,
    Places,
    Verdict,
    accept_equal,
    accept_rejection,
)


def verify_rejection(
    law: torch.Tensor,  # [R, V]
    drafts: Drafts,
    accept_draws: torch.Tensor,  # [D]
    recover_draws: torch.Tensor,  # [S]
) -> list[Verdict]:
    """Of speculative sampling."""
    places = Places.of(drafts.lengths)
    return _read(accept_rejection(law, drafts, places, accept_draws, recover_draws))


def verify_equal(choices: torch.Tensor, drafts: Drafts) -> list[Verdict]:  # [R]
    """Of comparison with the target's own choices."""
    return _read(accept_equal(choices, drafts, Places.of(drafts.lengths)))


def _read(outcome: torch.Tensor) -> list[Verdict]:
    accepted, following = outcome.tolist()
    return [Verdict(a, t) for a, t in zip(accepted, following, strict=True)]
