"""The sequential head (paper §3.1): what the token drafted before adds to a position's logits.

    Markov  B_k = W1[x_{k-1}] W2
    gated   B_k = (σ(W_g [h_k ; W1[x_{k-1}]] + b) ⊙ W1[x_{k-1}]) W2
    RNN     [g ; c ; o] = W_j [s_{k-1} ; W1[x_{k-1}] ; h_k] + b,  s_0 = 0
            s_k = σ(g) ⊙ s_{k-1} + (1 - σ(g)) ⊙ tanh(c),  B_k = tanh(o) W2
    none    B_k = 0, which makes a DFlash drafter

All are a code of r values a position, made from the embedding W1[x_{k-1}]; W2 turns it into a bias.

Shape symbols: S blocks, γ block size, d width, V vocabulary, V_d draft vocabulary, r rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dspark.errors import CheckpointError

_OPEN = 4.0  # σ(4) = 0.98: a gate that lets all but everything through
_LINEAR = 0.1  # tanh(x) is x to a third of a percent up to here


class MarkovHead(nn.Module):
    """The embedding is the code."""

    def __init__(self, vocab_size: int, draft_vocab_size: int, rank: int, hidden_size: int) -> None:
        super().__init__()
        self.rank = rank
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab_size, bias=False)
        # W1 at unit scale and W2 at nothing: no bias to begin with, but a gradient for W2 at once.
        # Two small factors would leave both without one.
        nn.init.normal_(self.markov_w1.weight, std=1.0)
        nn.init.zeros_(self.markov_w2.weight)

    def embed(self, previous: torch.Tensor) -> torch.Tensor:  # [...] -> [..., r]
        """W1[x]."""
        out: torch.Tensor = self.markov_w1(previous)
        return out

    def bias(self, code: torch.Tensor) -> torch.Tensor:  # [..., r] -> [..., V_d]
        """B, from the code."""
        out: torch.Tensor = self.markov_w2(code)
        return out

    def first_state(self, blocks: int) -> torch.Tensor:  # [S, 0]
        """What a block begins with."""
        return self.markov_w1.weight.new_zeros(blocks, 0)

    def step(
        self,
        embedded: torch.Tensor,  # [S, r]
        hidden: torch.Tensor,  # [S, d]
        state: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # [S, r], state
        """The code of one position, and the state for the next."""
        return embedded, state

    def codes(
        self,
        embedded: torch.Tensor,  # [S, γ, r]
        hidden: torch.Tensor,  # [S, γ, d]
    ) -> torch.Tensor:  # [S, γ, r]
        """The codes of whole blocks whose tokens are known."""
        # Each position for itself: a state, which these heads have none of, would take a loop.
        return self.step(embedded, hidden, embedded)[0]

    @torch.no_grad()
    def start_from(
        self,
        w1: torch.Tensor,  # [V, r]
        w2: torch.Tensor,  # [V_d, r]
    ) -> None:
        """Begin as a Markov head with these factors, as nearly as this kind of head can."""
        self.markov_w1.weight.copy_(w1)
        self.markov_w2.weight.copy_(w2)


class GatedHead(MarkovHead):
    """The embedding through a gate that sees the backbone."""

    def __init__(self, vocab_size: int, draft_vocab_size: int, rank: int, hidden_size: int) -> None:
        super().__init__(vocab_size, draft_vocab_size, rank, hidden_size)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def step(
        self, embedded: torch.Tensor, hidden: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See MarkovHead."""
        gate = torch.sigmoid(self.gate_proj(torch.cat([hidden, embedded], dim=-1)))
        return gate * embedded, state

    @torch.no_grad()
    def start_from(self, w1: torch.Tensor, w2: torch.Tensor) -> None:
        """See MarkovHead."""
        super().start_from(w1, w2)
        self.gate_proj.weight.zero_()
        self.gate_proj.bias.fill_(_OPEN)


class RecurrentHead(MarkovHead):
    """A state that remembers the block so far."""

    def __init__(self, vocab_size: int, draft_vocab_size: int, rank: int, hidden_size: int) -> None:
        super().__init__(vocab_size, draft_vocab_size, rank, hidden_size)
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def first_state(self, blocks: int) -> torch.Tensor:  # [S, r]
        """s_0."""
        return self.markov_w1.weight.new_zeros(blocks, self.rank)

    def step(
        self, embedded: torch.Tensor, hidden: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See MarkovHead."""
        joint = self.joint_proj(torch.cat([state, embedded, hidden], dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        keep = torch.sigmoid(gate)
        return torch.tanh(output), keep * state + (1.0 - keep) * torch.tanh(candidate)

    def codes(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """See MarkovHead."""
        state, codes = self.first_state(len(embedded)), []
        for k in range(embedded.shape[1]):
            code, state = self.step(embedded[:, k], hidden[:, k], state)
            codes.append(code)
        return torch.stack(codes, dim=1)

    @torch.no_grad()
    def start_from(self, w1: torch.Tensor, w2: torch.Tensor) -> None:
        """See MarkovHead: the output begins as the embedding, so small that tanh is linear."""
        scale = _LINEAR / w1.abs().max().clamp(min=1e-6)
        super().start_from(w1, w2 / scale)
        output = self.joint_proj.weight[2 * self.rank :]
        output.zero_()
        output[:, self.rank : 2 * self.rank] = scale * torch.eye(self.rank)
        self.joint_proj.bias[2 * self.rank :].zero_()


class NoHead(nn.Module):
    """Every position for itself."""

    rank = 0

    def embed(self, previous: torch.Tensor) -> torch.Tensor:  # [...] -> [..., 0]
        """Nothing."""
        return torch.zeros(*previous.shape, 0, device=previous.device)

    def bias(self, code: torch.Tensor) -> torch.Tensor:  # [..., 0] -> [..., 1]
        """Zero, for every token."""
        return code.new_zeros(*code.shape[:-1], 1)

    def first_state(self, blocks: int) -> torch.Tensor:  # [S, 0]
        """Nothing."""
        return torch.zeros(blocks, 0)

    def step(
        self, embedded: torch.Tensor, hidden: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See MarkovHead."""
        return embedded.to(hidden.dtype), state

    def codes(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """See MarkovHead."""
        return embedded.to(hidden.dtype)


SequentialHead = MarkovHead | NoHead

_KINDS: dict[str, type[MarkovHead]] = {
    "vanilla": MarkovHead,
    "gated": GatedHead,
    "rnn": RecurrentHead,
}


def check_head(kind: str, rank: int) -> None:
    """CheckpointError if there is no such head."""
    if kind not in _KINDS:
        raise CheckpointError(f"markov_head_type must be one of {sorted(_KINDS)}; got {kind!r}")
    if rank < 0:
        raise CheckpointError(f"markov_rank must be at least 0 (no head); got {rank}")


def sequential_head(
    kind: str, rank: int, *, vocab_size: int, draft_vocab_size: int, hidden_size: int
) -> SequentialHead:
    """A fresh head; rank 0: none."""
    if not rank:
        return NoHead()
    return _KINDS[kind](vocab_size, draft_vocab_size, rank, hidden_size)


class ConfidenceHead(nn.Module):
    """Logit of the chance that a draft token is accepted: w · [h_k ; W1[x_{k-1}]] + b (§3.2)."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        """`rank` 0: of h_k alone."""
        super().__init__()
        self._rank = rank
        self.proj = nn.Linear(hidden_size + rank, 1)

    def forward(
        self,
        hidden: torch.Tensor,  # [..., d]
        embedded: torch.Tensor,  # [..., r]
    ) -> torch.Tensor:  # [...]
        """Before x_k is drawn, so that it cannot tell of it."""
        features = torch.cat([hidden, embedded], dim=-1) if self._rank else hidden
        # F.linear keeps this one row out of packing, where the kernels want more than one output
        out = F.linear(features, self.proj.weight, self.proj.bias)
        return out[..., 0]
