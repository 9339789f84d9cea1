"""From a step's logits to a verdict for each request, whatever mix of sampling rules it holds.

What the host knows of the requests goes to the logits' device in one copy, and the verdicts come
back in one. Symbols as in dspark.decoding.acceptance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from dspark.decoding.acceptance import (
    Drafts,
    Places,
    Verdict,
    accept_equal,
    accept_rejection,
    coupled_choices,
)
from dspark.decoding.drawing import COUPLED, GREEDY, INDEPENDENT
from dspark.decoding.law import Cuts, target_law
from dspark.decoding.noise import Stream, draw_key, draw_keys, key_tensor, uniform
from dspark.kernels.cpu import operators
from dspark.kernels.dispatch import has_triton
from dspark.kernels.transfer import to_device, to_host
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
    parts = _parts(judged, logits.shape[-1])
    width = len(_Inputs._fields)
    moved = to_device([tensor for part in parts for tensor in part.inputs], logits.device)
    outcomes = [
        _decide(part, logits, _Inputs(*moved[i * width : (i + 1) * width]))
        for i, part in enumerate(parts)
    ]
    (outcome,) = to_host([torch.cat(outcomes, dim=1)])
    accepted, following = outcome.tolist()
    members = [i for part in parts for i in part.members]
    verdicts = dict(zip(members, map(Verdict, accepted, following), strict=True))
    return [verdicts[i] for i in range(len(judged))]


def _has_operator(logits: torch.Tensor) -> bool:
    """Whether one operator takes requests of all kinds at once."""
    if has_triton(logits.device):
        return logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return logits.dtype == torch.float32 and logits.device.type == "cpu" and operators.available()


def _judge_fast(logits: torch.Tensor, judged: list[Judged]) -> list[Verdict]:
    """The same by one operator: no dense law is made, and no law past a refusal is looked at."""
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
    drafted = _drafts(judged, with_law=True)
    assert drafted.candidate_ids is not None
    assert drafted.candidate_probs is not None
    rules = operators.JudgeRules(
        kinds=torch.tensor(kinds),
        temperature=torch.tensor([1.0 if p.greedy else p.temperature for p in sampling]),
        top_k=torch.tensor([p.top_k for p in sampling]),
        top_p=torch.tensor([p.top_p for p in sampling]),
        accept_keys=key_tensor(accept),
        recover_keys=key_tensor(recover),
        noise_keys=key_tensor(noise),
    )
    laws = drafted.candidate_ids, drafted.candidate_probs
    if has_triton(logits.device):
        from dspark.kernels.triton import acceptance

        outcome = acceptance.judge(logits, drafted.lengths, drafted.token_ids, *laws, rules)
        ((accepted, following),) = to_host([outcome])
    else:
        accepted, following = operators.judge(
            logits.contiguous(), drafted.lengths, drafted.token_ids, *laws, rules
        )
    return [Verdict(a, t) for a, t in zip(accepted.tolist(), following.tolist(), strict=True)]


def _kind(sampling: SamplingParams) -> int:
    if sampling.greedy:
        return GREEDY
    return COUPLED if sampling.mode is VerifyMode.COUPLED else INDEPENDENT


def _accept_keys(one: Judged) -> list[int]:
    seed, fence = one.request.sampling.seed, one.fence
    return draw_keys(seed, Stream.ACCEPT, fence.epoch, fence.round, last=range(one.verified))


def _noise_keys(one: Judged) -> list[int]:
    seed, start = one.request.sampling.seed, one.fence.committed_len
    return draw_keys(seed, Stream.COUPLED, last=range(start, start + one.verified + 1))


class _Inputs(NamedTuple):
    """What requests of one kind are decided by. Empty where the kind has no use for it."""

    rows: torch.Tensor  # [R] rows of the step, where not all are theirs
    drafts: torch.Tensor  # [D]
    candidate_ids: torch.Tensor  # [D, K]
    candidate_probs: torch.Tensor  # [D, K]
    judging: torch.Tensor  # of Places, like the next three
    grid: torch.Tensor
    first_rows: torch.Tensor
    lengths: torch.Tensor
    temperature: torch.Tensor  # [R] fp32
    top_k: torch.Tensor  # [R] int64
    top_p: torch.Tensor  # [R] fp32
    nucleus: torch.Tensor  # of Cuts
    accept_keys: torch.Tensor  # [D]
    recover_keys: torch.Tensor  # [S]
    noise_keys: torch.Tensor  # [R]


@dataclass(frozen=True, slots=True)
class _Part:
    """The requests of one kind."""

    kind: int
    members: list[int]  # index into all that are judged
    whole: bool  # there are no others
    most_k: int  # of Cuts
    inputs: _Inputs  # on the host


def _parts(judged: list[Judged], vocabulary: int) -> list[_Part]:
    kinds = [_kind(one.request.sampling) for one in judged]
    return [_part(kind, kinds, judged, vocabulary) for kind in sorted(set(kinds))]


def _part(kind: int, kinds: list[int], judged: list[Judged], vocabulary: int) -> _Part:
    rows: list[int] = []
    members: list[int] = []
    end = 0
    for i, one in enumerate(judged):
        start, end = end, end + one.verified + 1
        if kinds[i] == kind:
            members.append(i)
            rows += range(start, end)
    own = [judged[i] for i in members]
    drafts = _drafts(own, with_law=kind == INDEPENDENT)
    nothing = torch.zeros(0)
    drawn = [] if kind == GREEDY else own  # whose law is needed
    sampling = [one.request.sampling for one in drawn for _ in range(one.verified + 1)]
    top_k = torch.tensor([p.top_k for p in sampling], dtype=torch.int64)
    top_p = torch.tensor([p.top_p for p in sampling])
    cuts = Cuts.of(top_k, top_p, vocabulary)
    rejecting = drawn if kind == INDEPENDENT else []
    fences = [(one.request.sampling.seed, one.fence) for one in rejecting]
    inputs = _Inputs(
        torch.tensor(rows),
        drafts.token_ids,
        nothing if drafts.candidate_ids is None else drafts.candidate_ids,
        nothing if drafts.candidate_probs is None else drafts.candidate_probs,
        *Places.of(drafts.lengths),
        temperature=torch.tensor([p.temperature for p in sampling]),
        top_k=top_k,
        top_p=top_p,
        nucleus=cuts.nucleus,
        accept_keys=key_tensor([key for one in rejecting for key in _accept_keys(one)]),
        recover_keys=key_tensor(
            [draw_key(seed, Stream.RECOVER, fence.epoch, fence.round) for seed, fence in fences]
        ),
        noise_keys=key_tensor(
            [key for one in drawn if kind == COUPLED for key in _noise_keys(one)]
        ),
    )
    return _Part(kind, members, len(own) == len(judged), cuts.most_k, inputs)


def _decide(part: _Part, logits: torch.Tensor, on: _Inputs) -> torch.Tensor:  # [2, S]
    if not part.whole:
        logits = logits[on.rows]
    drafts = Drafts((), on.drafts, on.candidate_ids, on.candidate_probs)
    places = Places(on.judging, on.grid, on.first_rows, on.lengths)
    if part.kind == GREEDY:
        return accept_equal(logits.argmax(dim=-1), drafts, places)
    cuts = Cuts(part.most_k, on.nucleus)
    law = target_law(logits, on.temperature, on.top_k, on.top_p, cuts)
    if part.kind == COUPLED:
        return accept_equal(coupled_choices(law, on.noise_keys), drafts, places)
    return accept_rejection(law, drafts, places, uniform(on.accept_keys), uniform(on.recover_keys))


def _drafts(judged: list[Judged], with_law: bool = False) -> Drafts:  # on the host
    lengths = tuple(one.verified for one in judged)
    token_ids = np.zeros(sum(lengths), dtype=np.int64)
    laws = []  # where each begins
    at = 0
    for one in judged:
        if one.verified == 0:
            continue
        assert one.proposal is not None
        token_ids[at : at + one.verified] = one.proposal.token_ids[: one.verified]
        if one.proposal.candidate_ids is not None:  # else it needs none
            assert one.proposal.candidate_probs is not None
            laws.append(
                (at, one.verified, one.proposal.candidate_ids, one.proposal.candidate_probs)
            )
        at += one.verified
    drafts = Drafts(lengths, torch.from_numpy(token_ids))
    if not with_law:
        return drafts
    # Two draft replicas may cut their laws at different widths: entries of no probability fill up.
    width = max((ids.shape[1] for _, _, ids, _ in laws), default=1)
    all_ids = np.zeros((at, width), dtype=np.int64)
    all_probs = np.zeros((at, width), dtype=np.float32)
    for start, count, ids, probs in laws:
        all_ids[start : start + count, : ids.shape[1]] = ids[:count]
        all_probs[start : start + count, : ids.shape[1]] = probs[:count]
    return replace(
        drafts,
        candidate_ids=torch.from_numpy(all_ids),
        candidate_probs=torch.from_numpy(all_probs),
    )
