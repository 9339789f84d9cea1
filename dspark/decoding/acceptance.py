"""Which drafted tokens stand, and what follows them (design §2, paper §2).

Rows and drafts are flattened over sequences. Sequence s owns rows start[s] .. start[s]+ℓ_s, one for
the anchor and one for each admitted draft token; row start[s]+j judges draft token j (0-based) and,
if all ℓ_s stand, row start[s]+ℓ_s gives the bonus token. Symbols: S sequences, R = Σ(1+ℓ_s) rows,
D = Σℓ_s drafts, K candidates, V vocabulary.

Rejection: accept x with probability min(1, p(x)/q(x)); at the first refusal draw from
max(p - q, 0), normalised; after the last acceptance draw from p. Each emitted token then follows p.

Equality (`coupled` and greedy): the target's own choice y is emitted in any case, and a draft token
stands exactly when it equals y. The output is the target's whatever was drafted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark.decoding.noise import gumbel


@dataclass(frozen=True, slots=True)
class Drafts:
    """The admitted draft tokens of one batch, flattened over sequences."""

    lengths: tuple[int, ...]  # ℓ_s, S entries
    token_ids: torch.Tensor  # [D] int64
    candidate_ids: torch.Tensor | None = None  # [D, K] int64
    candidate_probs: torch.Tensor | None = None  # [D, K] float32


@dataclass(frozen=True, slots=True)
class Verdict:
    """For one sequence: how many draft tokens stand, and the token that follows them."""

    accepted: int
    next_token_id: int


def verify_rejection(
    law: torch.Tensor,  # [R, V] target law p
    drafts: Drafts,
    accept_draws: torch.Tensor,  # [D] uniform
    recover_draws: torch.Tensor,  # [S] uniform
) -> list[Verdict]:
    """Speculative sampling against a sparse proposal law; ValueError if the law is missing."""
    if drafts.candidate_ids is None or drafts.candidate_probs is None:
        raise ValueError("rejection needs the proposal's candidates and their probabilities")
    rows = _judging_rows(drafts.lengths, law.device)
    p = law[rows, drafts.token_ids]
    hit = drafts.candidate_ids == drafts.token_ids[:, None]
    q = (drafts.candidate_probs * hit).sum(dim=-1)
    # u·q < p rather than u < p/q: the same test, and q = 0 needs no special case
    accepted = _prefix_lengths((accept_draws * q < p).tolist(), drafts.lengths)

    stop_rows: list[int] = []
    refused: list[tuple[int, int]] = []  # (sequence, flat draft index) where a draft was refused
    row = first = 0
    for s, length in enumerate(drafts.lengths):
        stop_rows.append(row + accepted[s])
        if accepted[s] < length:
            refused.append((s, first + accepted[s]))
        row += length + 1
        first += length
    residual = law[stop_rows].double()
    if refused:
        sequences = torch.tensor([s for s, _ in refused], device=law.device)
        index = torch.tensor([i for _, i in refused], device=law.device)
        full = residual[sequences]
        rest = full.scatter_add(
            1, drafts.candidate_ids[index], -drafts.candidate_probs[index].double()
        ).clamp_(min=0.0)
        # p = q up to rounding leaves nothing: then p itself is the residual's limit
        empty = rest.sum(dim=-1, keepdim=True) <= 0.0
        residual[sequences] = torch.where(empty, full, rest)
    chosen = _invert_cdf(residual, recover_draws)
    return [Verdict(a, t) for a, t in zip(accepted, chosen.tolist(), strict=True)]


def verify_equal(
    choices: torch.Tensor,  # [R] int64, the target's own token for each row
    drafts: Drafts,
) -> list[Verdict]:
    """Accept drafts while they equal the target's own choices."""
    rows = _judging_rows(drafts.lengths, choices.device)
    accepted = _prefix_lengths((choices[rows] == drafts.token_ids).tolist(), drafts.lengths)
    own = choices.tolist()
    verdicts, row = [], 0
    for length, stand in zip(drafts.lengths, accepted, strict=True):
        verdicts.append(Verdict(stand, own[row + stand]))
        row += length + 1
    return verdicts


def coupled_choices(
    law: torch.Tensor,  # [R, V] target law p
    keys: torch.Tensor,  # [R] int64, one a (seed, absolute position)
) -> torch.Tensor:  # [R] int64
    """y = argmax(log p + g): a draw from p that depends on key and p alone."""
    tokens = torch.arange(law.shape[-1], device=law.device)
    return torch.argmax(torch.log(law.double()) + gumbel(keys, tokens), dim=-1)


def sample(law: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:  # [N, V], [N] -> [N] int64
    """One token a row from `law`, by inverting the CDF at a uniform draw."""
    return _invert_cdf(law.double(), draws)


def _invert_cdf(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    cdf = weights.cumsum(dim=-1)
    # right=True skips tokens of zero weight: the first cdf value *above* the draw wins
    index = torch.searchsorted(cdf, (draws.double() * cdf[:, -1])[:, None], right=True)[:, 0]
    return index.clamp_(max=weights.shape[-1] - 1)


def _judging_rows(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    rows: list[int] = []
    row = 0
    for length in lengths:
        rows.extend(range(row, row + length))
        row += length + 1
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _prefix_lengths(flags: list[bool], lengths: Sequence[int]) -> list[int]:
    out, first = [], 0
    for length in lengths:
        stand = 0
        while stand < length and flags[first + stand]:
            stand += 1
        out.append(stand)
        first += length
    return out
