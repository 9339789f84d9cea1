"""Drawing a drafted token from its law, by each session's own sampling rules.

Symbols: S sessions, B block size, V_d draft vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark.decoding.acceptance import sample
from dspark.decoding.law import proposal_law
from dspark.decoding.noise import Stream, draw_keys, gumbel, key_tensor, uniform
from dspark.types import Fence, SamplingParams, VerifyMode

GREEDY, INDEPENDENT, COUPLED = 0, 1, 2


@dataclass(frozen=True, slots=True)
class DrawRules:
    """How each session draws the tokens of its block."""

    kinds: torch.Tensor  # [S] int64: GREEDY, INDEPENDENT or COUPLED
    temperature: torch.Tensor  # [S] fp32, above 0
    top_k: torch.Tensor  # [S] int64, 0: off
    top_p: torch.Tensor  # [S] fp32
    keys: torch.Tensor  # [S, B] int64, names of the draws; 0 where there is none

    @classmethod
    def of(
        cls, fences: Sequence[Fence], sampling: Sequence[SamplingParams], size: int
    ) -> DrawRules:
        """Rules of blocks of `size` tokens after the states that the fences name."""
        kinds, keys = [], []
        for fence, params in zip(fences, sampling, strict=True):
            positions = range(fence.committed_len, fence.committed_len + size)
            if params.greedy:
                kinds.append(GREEDY)
                keys += [0] * size
            elif params.mode is VerifyMode.COUPLED:
                kinds.append(COUPLED)
                keys += draw_keys(params.seed, Stream.COUPLED, last=positions)
            else:
                kinds.append(INDEPENDENT)
                keys += draw_keys(
                    params.seed, Stream.DRAFT, fence.epoch, fence.round, last=positions
                )
        return cls(
            kinds=torch.tensor(kinds),
            temperature=torch.tensor([1.0 if p.greedy else p.temperature for p in sampling]),
            top_k=torch.tensor([p.top_k for p in sampling]),
            top_p=torch.tensor([p.top_p for p in sampling]),
            keys=key_tensor(keys).view(-1, size),
        )

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The fields, in order."""
        return self.kinds, self.temperature, self.top_k, self.top_p, self.keys

    def present(self) -> frozenset[int]:
        """The kinds that occur: to be read on the host, since a GPU would have to be waited for."""
        return frozenset(self.kinds.tolist())


@dataclass(frozen=True, slots=True)
class DrawnBlocks:
    """Drafted tokens, and the law of each position for sessions that draw independently."""

    tokens: torch.Tensor  # [S, B] int64, target ids
    confidence_logits: torch.Tensor  # [S, B] fp32
    candidate_ids: torch.Tensor  # [S, B, K] int64; zeros where a session's kind needs no law
    candidate_probs: torch.Tensor  # [S, B, K] fp32

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The fields, in order."""
        return self.tokens, self.confidence_logits, self.candidate_ids, self.candidate_probs


def likeliest_logit(logits: torch.Tensor) -> torch.Tensor:  # [..., V_d] -> [...]
    """Of the chance of the likeliest token: a first guess at whether what is drawn will stand.

    It does not depend on which token is drawn.
    """
    return torch.logit(logits.float().softmax(dim=-1).amax(dim=-1), eps=1e-6)


def draw(
    logits: torch.Tensor,  # [S, V_d]
    vocabulary: torch.Tensor,  # [V_d] int64, draft id -> target id
    rules: DrawRules,  # on the device of the logits
    present: frozenset[int],  # kinds that occur in the rules
    position: int,
    candidates: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens [S], and the law they were drawn from: ids and probabilities [S, K]."""
    kinds, keys = rules.kinds, rules.keys[:, position]
    best = vocabulary[logits.argmax(dim=-1)]
    k = min(candidates, logits.shape[-1])
    if present <= {GREEDY}:
        none = best.new_zeros(len(best), k)
        return best, none, none.float()
    ids, probs = proposal_law(logits, k, rules.temperature, rules.top_k, rules.top_p)
    ids = vocabulary[ids]
    index = sample(probs, uniform(keys))
    if COUPLED in present:
        noisy = torch.log(probs.double()) + gumbel(keys, ids)
        index = torch.where(kinds == COUPLED, noisy.argmax(dim=-1), index)
    drawn = torch.where(kinds == GREEDY, best, ids.gather(1, index[:, None])[:, 0])
    shown = (kinds == INDEPENDENT)[:, None]
    return drawn, ids * shown, probs * shown
