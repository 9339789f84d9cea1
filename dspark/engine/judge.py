"""From a step's logits to a verdict for each request, whatever mix of sampling rules it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dspark.decoding.acceptance import (
    Drafts,
    Verdict,
    coupled_choices,
    verify_equal,
    verify_rejection,
)
from dspark.decoding.drawing import COUPLED, GREEDY, INDEPENDENT
from dspark.decoding.law import target_law
from dspark.decoding.noise import Stream, draw_key, key_tensor, uniform
from dspark.kernels.cpu import operators
from dspark.types import BlockProposal, Fence, Request, SamplingParams, VerifyMode


@dataclass(frozen=True, slots=True)
class Judged:
    """A request whose rows decide tokens in this step."""

    request: Request
    fence: Fence
    proposal: BlockProposal | None
    verified: int  # ℓ: admitted draft tokens


def judge(
    logits: torch.Tensor,  # [N, V], Σ(1+ℓ) rows in the order of `judged`
    judged: list[Judged],
) -> list[Verdict]:
    """One verdict a request, in order."""
    if not judged:
        return []
    if _has_operator(logits):
        return _judge_fast(logits, judged)
    verdicts: dict[int, Verdict] = {}
    for members, decide in _split(judged):
        if not members:
            continue
        rows = _rows_of(members, judged, logits.device)
        part = logits if len(members) == len(judged) else logits[rows]
        for index, verdict in zip(members, decide(part, [judged[i] for i in members]), strict=True):
            verdicts[index] = verdict
    return [verdicts[i] for i in range(len(judged))]


def _has_operator(logits: torch.Tensor) -> bool:
    return logits.dtype == torch.float32 and logits.device.type == "cpu" and operators.available()


def _judge_fast(logits: torch.Tensor, judged: list[Judged]) -> list[Verdict]:
    """The same by the C++ operator: no dense law is made, and a row past a refusal is not read."""
    kinds = [_kind(one.request.sampling) for one in judged]
    accept: list[int] = []
    recover: list[int] = []
    noise: list[int] = []
    for one, kind in zip(judged, kinds, strict=True):
        seed, fence, drafts = one.request.sampling.seed, one.fence, one.verified
        if kind == INDEPENDENT:
            accept += _accept_keys(one)
            recover.append(draw_key(seed, Stream.RECOVER, fence.epoch, fence.round))
        else:
            accept += [0] * drafts
            recover.append(0)
        noise += _noise_keys(one) if kind == COUPLED else [0] * (drafts + 1)
    sampling = [one.request.sampling for one in judged]
    drafted = _drafts(judged, logits.device, with_law=True)
    assert drafted.candidate_ids is not None
    assert drafted.candidate_probs is not None
    accepted, following = operators.judge(
        logits.contiguous(),
        drafted.lengths,
        drafted.token_ids,
        drafted.candidate_ids,
        drafted.candidate_probs,
        operators.JudgeRules(
            kinds=torch.tensor(kinds),
            temperature=torch.tensor([1.0 if p.greedy else p.temperature for p in sampling]),
            top_k=torch.tensor([p.top_k for p in sampling]),
            top_p=torch.tensor([p.top_p for p in sampling]),
            accept_keys=key_tensor(accept),
            recover_keys=key_tensor(recover),
            noise_keys=key_tensor(noise),
        ),
    )
    return [Verdict(a, t) for a, t in zip(accepted.tolist(), following.tolist(), strict=True)]


def _kind(sampling: SamplingParams) -> int:
    if sampling.greedy:
        return GREEDY
    return COUPLED if sampling.mode is VerifyMode.COUPLED else INDEPENDENT


def _accept_keys(one: Judged) -> list[int]:
    seed, fence = one.request.sampling.seed, one.fence
    return [draw_key(seed, Stream.ACCEPT, fence.epoch, fence.round, k) for k in range(one.verified)]


def _noise_keys(one: Judged) -> list[int]:
    seed, start = one.request.sampling.seed, one.fence.committed_len
    return [draw_key(seed, Stream.COUPLED, start + k) for k in range(one.verified + 1)]


_Decide = Callable[[torch.Tensor, list[Judged]], list[Verdict]]


def _split(judged: list[Judged]) -> list[tuple[list[int], _Decide]]:
    greedy: list[int] = []
    coupled: list[int] = []
    rejection: list[int] = []
    for i, one in enumerate(judged):
        kind = _kind(one.request.sampling)
        (greedy if kind == GREEDY else coupled if kind == COUPLED else rejection).append(i)
    return [(greedy, _greedy), (coupled, _coupled), (rejection, _rejection)]


def _greedy(logits: torch.Tensor, judged: list[Judged]) -> list[Verdict]:
    return verify_equal(logits.argmax(dim=-1), _drafts(judged, logits.device))


def _coupled(logits: torch.Tensor, judged: list[Judged]) -> list[Verdict]:
    keys = [key for one in judged for key in _noise_keys(one)]
    choices = coupled_choices(_law(logits, judged), key_tensor(keys, logits.device))
    return verify_equal(choices, _drafts(judged, logits.device))


def _rejection(logits: torch.Tensor, judged: list[Judged]) -> list[Verdict]:
    accept, recover = [], []
    for one in judged:
        seed, fence = one.request.sampling.seed, one.fence
        accept += _accept_keys(one)
        recover.append(draw_key(seed, Stream.RECOVER, fence.epoch, fence.round))
    device = logits.device
    return verify_rejection(
        _law(logits, judged),
        _drafts(judged, device, with_law=True),
        uniform(key_tensor(accept, device)),
        uniform(key_tensor(recover, device)),
    )


def _law(logits: torch.Tensor, judged: list[Judged]) -> torch.Tensor:
    per_row = [one.request.sampling for one in judged for _ in range(one.verified + 1)]
    device = logits.device
    return target_law(
        logits,
        torch.tensor([p.temperature for p in per_row], device=device),
        torch.tensor([p.top_k for p in per_row], device=device),
        torch.tensor([p.top_p for p in per_row], device=device),
    )


def _drafts(judged: list[Judged], device: torch.device, with_law: bool = False) -> Drafts:
    token_ids: list[int] = []
    ids, probs = [], []
    for one in judged:
        if one.verified == 0:
            continue
        assert one.proposal is not None
        token_ids += one.proposal.token_ids[: one.verified].tolist()
        if with_law and one.proposal.candidate_ids is None:  # it needs none
            ids.append(torch.zeros(one.verified, 1, dtype=torch.int64))
            probs.append(torch.zeros(one.verified, 1))
        elif with_law:
            assert one.proposal.candidate_ids is not None
            assert one.proposal.candidate_probs is not None
            ids.append(torch.from_numpy(one.proposal.candidate_ids[: one.verified]))
            probs.append(torch.from_numpy(one.proposal.candidate_probs[: one.verified]))
    # Two draft replicas may cut their laws at different widths: pad with entries of no probability.
    width = max((one.shape[1] for one in ids), default=1)
    ids = [F.pad(one, (0, width - one.shape[1])) for one in ids]
    probs = [F.pad(one, (0, width - one.shape[1])) for one in probs]
    empty = torch.zeros(0, width)
    return Drafts(
        lengths=tuple(one.verified for one in judged),
        token_ids=torch.tensor(token_ids, dtype=torch.int64, device=device),
        candidate_ids=(torch.cat(ids) if ids else empty.long()).to(device) if with_law else None,
        candidate_probs=(torch.cat(probs) if probs else empty).to(device) if with_law else None,
    )


def _rows_of(members: list[int], judged: list[Judged], device: torch.device) -> torch.Tensor:
    starts, row = [], 0
    for one in judged:
        starts.append(row)
        row += one.verified + 1
    rows = [starts[i] + k for i in members for k in range(judged[i].verified + 1)]
    return torch.tensor(rows, dtype=torch.int64, device=device)
