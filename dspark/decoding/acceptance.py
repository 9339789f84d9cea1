"""Which drafted tokens stand, and what follows them (design §2, paper §2).

Rows and drafts are flattened over sequences. Sequence s owns rows start[s] .. start[s]+ℓ_s, one for
the anchor and one for each admitted draft token; row start[s]+j judges draft token j (0-based) and,
if all ℓ_s stand, row start[s]+ℓ_s gives the bonus token. Symbols: S sequences, R = Σ(1+ℓ_s) rows,
D = Σℓ_s drafts, K candidates, V vocabulary.

Rejection: accept x with probability min(1, p(x)/q(x)); at the first refusal draw from
max(p - q, 0), normalised; after the last acceptance draw from p. Each emitted token then follows p.

Equality (`coupled` and greedy): the target's own choice y is emitted in any case, and a draft token
stands exactly when it equals y. The output is the target's whatever was drafted.

Nothing here reads a value of a tensor, so nothing waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dspark.decoding.noise import gumbel


class Places(NamedTuple):
    """Where the rows and drafts of each sequence lie."""

    judging: torch.Tensor  # [D] int64: the row that judges each draft
    grid: torch.Tensor  # [S, max ℓ] int64: each sequence's drafts, D where there are no more
    first_rows: torch.Tensor  # [S] int64
    lengths: torch.Tensor  # [S] int64: ℓ_s

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Places:
        """The places of sequences with so many drafts each, on the host."""
        counts = np.array(lengths, dtype=np.int64)
        sequences, total = np.arange(len(counts)), int(counts.sum())
        first_drafts = np.cumsum(counts) - counts
        offset = np.arange(counts.max(initial=0))
        grid = np.where(offset < counts[:, None], first_drafts[:, None] + offset, total)
        judging = np.arange(total) + np.repeat(sequences, counts)
        arrays = (judging, grid, first_drafts + sequences, counts)
        return cls(*map(torch.from_numpy, arrays))

    def standing(self, flags: torch.Tensor) -> torch.Tensor:  # [D] bool -> [S] int64
        """How many of each sequence's drafts stand before the first that does not."""
        padded = torch.cat([flags, flags.new_zeros(1)])
        return padded[self.grid].long().cumprod(dim=1).sum(dim=1)


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


def accept_rejection(
    law: torch.Tensor,  # [R, V] target law p
    drafts: Drafts,
    places: Places,
    accept_draws: torch.Tensor,  # [D] uniform
    recover_draws: torch.Tensor,  # [S] uniform
) -> torch.Tensor:  # [2, S] int64: how many stand, and what follows them
    """Speculative sampling against a sparse proposal law; ValueError if the law is missing."""
    if drafts.candidate_ids is None or drafts.candidate_probs is None:
        raise ValueError("rejection needs the proposal's candidates and their probabilities")
    p = law[places.judging, drafts.token_ids]
    hit = drafts.candidate_ids == drafts.token_ids[:, None]
    q = (drafts.candidate_probs * hit).sum(dim=-1)
    # u·q < p rather than u < p/q: the same test, and q = 0 needs no special case
    accepted = places.standing(accept_draws * q < p)
    weights = law[places.first_rows + accepted].double()
    if len(drafts.token_ids):
        refused = accepted < places.lengths
        sequences = torch.arange(len(accepted), device=law.device)
        at = (places.first_rows - sequences + accepted).clamp_(max=len(drafts.token_ids) - 1)
        rest = weights.scatter_add(
            1, drafts.candidate_ids[at], -drafts.candidate_probs[at].double()
        ).clamp_(min=0.0)
        # p = q up to rounding leaves nothing: then p itself is the residual's limit
        left = rest.sum(dim=-1) > 0.0
        weights = torch.where((refused & left)[:, None], rest, weights)
    return torch.stack([accepted, _invert_cdf(weights, recover_draws)])


def accept_equal(
    choices: torch.Tensor,  # [R] int64, the target's own token for each row
    drafts: Drafts,
    places: Places,
) -> torch.Tensor:  # [2, S] int64: how many stand, and what follows them
    """Accept drafts while they equal the target's own choices."""
    accepted = places.standing(choices[places.judging] == drafts.token_ids)
    return torch.stack([accepted, choices[places.first_rows + accepted]])


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
