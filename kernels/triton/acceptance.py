"""Which drafted tokens stand, and what follows them, on a GPU (dspark.decoding.acceptance).

No dense law is made. A row of logits x is cut into chunks of fixed bounds, and of each is kept only
what deciding needs:

    greedy     the greatest x, and its token
    coupled    the greatest x/T + g of the kept tokens, and its token: argmax log p + g, since log p
               differs from x/T by the same amount for all that are kept
    rejection  m = max x and Σ exp((x - m)/T) of the kept tokens

Token i is kept if x_i > edge, or x_i = edge and i <= tie: what top-k and top-p leave, found on the
raw logits by search. A refused draft is replaced by inverting the CDF of max(p - q, 0): q has mass
on few tokens, so a chunk's mass is that of p less Σ min(p, q), and one chunk alone is looked at.

All sums have a fixed order, whatever else the batch holds. NaN counts as -inf.

Symbols: S sequences, N = Σ(1+ℓ) rows, D = Σℓ drafts, K candidates, V vocabulary, C chunks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from dspark.decoding.drawing import GREEDY, INDEPENDENT
from dspark.kernels.cpu.operators import JudgeRules
from dspark.kernels.transfer import to_device
from dspark.kernels.triton.launch import INTERPRETED, launch
from dspark.kernels.triton.noise import gumbel, uniform

CHUNK = 2048  # tokens of one program
# Places that one reading of a row tries. The interpreter pays for steps rather than for numbers.
WAYS = 64 if INTERPRETED else 8
_GREEDY = tl.constexpr(GREEDY)
_INDEPENDENT = tl.constexpr(INDEPENDENT)
_NOTHING = tl.constexpr(float("-inf"))
_LEFT = tl.constexpr(1e-9)  # less than this of p - q is rounding

# A value of these types, as fp32, ends in so many zero bits: no search need look at them.
ZERO_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


@triton.jit
def _values(row, i, vocabulary):  # -> fp32
    x = tl.load(row + i, mask=(i >= 0) & (i < vocabulary), other=0.0).to(tl.float32)
    return tl.where((i >= 0) & (i < vocabulary) & (x == x), x, _NOTHING)


@triton.jit
def _place(x, ZERO_BITS: tl.constexpr):  # fp32 -> int32 in the same order
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, -2147483648 - bits) >> ZERO_BITS


@triton.jit
def _at_place(place, ZERO_BITS: tl.constexpr):  # int32 -> fp32
    bits = place << ZERO_BITS
    return tl.where(bits >= 0, bits, -2147483648 - bits).to(tl.float32, bitcast=True)


@triton.jit
def _amounts(
    row, vocabulary, places, top, scale,
    COUNT: tl.constexpr, ZERO_BITS: tl.constexpr, WAYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many tokens (COUNT), or how much weight, lie at each of the places [WAYS] or above."""
    total = tl.zeros([WAYS, BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = _values(row, i, vocabulary)
        amount = tl.where(i < vocabulary, 1.0, 0.0) if COUNT else tl.exp((x - top) * scale)
        above = _place(x, ZERO_BITS)[None, :] >= places[:, None]
        total += tl.where(above, amount[None, :], 0.0)
    return tl.sum(total.to(tl.float64), 1)


@triton.jit
def _search(
    row, vocabulary, low, high, enough, top, scale,
    COUNT: tl.constexpr, ZERO_BITS: tl.constexpr, WAYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The highest place from which it is enough: it is from `low`, and is not from `high`.

    Many places are tried at once, since reading the row costs more than comparing it.
    """
    steps = tl.arange(0, WAYS).to(tl.int64) + 1
    while high - low > 1:
        places = low + (high - low) * steps // (WAYS + 1)
        amounts = _amounts(
            row, vocabulary, places.to(tl.int32), top, scale, COUNT, ZERO_BITS, WAYS, BLOCK
        )
        low, high = (
            tl.max(tl.where(amounts >= enough, places, low), 0),
            tl.min(tl.where(amounts >= enough, high, places), 0),
        )
    return low


@triton.jit
def find_cuts(
    edges,  # [N] fp32
    ties,  # [N] int32
    logits,  # [N, V], rows `row_stride` apart
    owners,  # [N] int64: the sequence of each row
    kinds,  # [S] int64
    temperature,  # [S] fp32
    top_k,  # [S] int64
    top_p,  # [S] fp32
    row_stride,
    vocabulary,
    ZERO_BITS: tl.constexpr,
    WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What top-k and then top-p leave of each row."""
    at = tl.program_id(0).to(tl.int64)
    owner = tl.load(owners + at)
    k = tl.load(top_k + owner)
    mass = tl.load(top_p + owner)
    by_count = (k > 0) & (k < vocabulary)
    if (tl.load(kinds + owner) == _GREEDY) | ((mass >= 1.0) & (by_count == 0)):
        tl.store(edges + at, _NOTHING)
        tl.store(ties + at, vocabulary)
        return
    row = logits + at * row_stride
    scale = 1.0 / tl.load(temperature + owner)
    highest = tl.full([BLOCK], _NOTHING, tl.float32)
    for start in range(0, vocabulary, BLOCK):
        highest = tl.maximum(highest, _values(row, start + tl.arange(0, BLOCK), vocabulary))
    top = tl.max(highest, 0)
    top = tl.where(top == _NOTHING, 0.0, top)  # of a row that has nothing, lest -inf + inf come up
    low = tl.full([], -2139095040 >> ZERO_BITS, tl.int64)  # the place of -inf
    high = _place(top, ZERO_BITS).to(tl.int64) + 1
    if by_count:
        low = _search(
            row, vocabulary, low, high, k.to(tl.float64), top, scale, True, ZERO_BITS, WAYS, BLOCK
        )
    tie = vocabulary
    if mass < 1.0:
        ways = tl.arange(0, WAYS)
        everything = _amounts(
            row, vocabulary, low.to(tl.int32) + ways * 0, top, scale, False, ZERO_BITS, WAYS, BLOCK
        )
        enough = mass.to(tl.float64) * tl.max(everything, 0)
        low = _search(row, vocabulary, low, high, enough, top, scale, False, ZERO_BITS, WAYS, BLOCK)
        above = _amounts(
            row, vocabulary, low.to(tl.int32) + 1 + ways * 0, top, scale, False, ZERO_BITS, WAYS,
            BLOCK,
        )  # fmt: skip
        edge = _at_place(low.to(tl.int32), ZERO_BITS)
        # of what ties at the edge, the first tokens, as many as it takes
        each = tl.exp((edge - top) * scale).to(tl.float64)
        needed = tl.ceil((enough - tl.max(above, 0)) / each)
        needed = tl.minimum(tl.maximum(needed, 1.0), vocabulary).to(tl.int32)
        tie = -1
        seen = 0
        for start in range(0, vocabulary, BLOCK):
            i = start + tl.arange(0, BLOCK)
            tied = (_values(row, i, vocabulary) == edge) & (i < vocabulary)
            count = seen + tl.cumsum(tied.to(tl.int32), 0)
            tie = tl.maximum(tie, tl.max(tl.where(tied & (count <= needed), i, -1), 0))
            seen += tl.sum(tied.to(tl.int32), 0)
    tl.store(edges + at, _at_place(low.to(tl.int32), ZERO_BITS))
    tl.store(ties + at, tie)


@triton.jit
def _kept(x, i, edge, tie):
    return (x > edge) | ((x == edge) & (i <= tie))


@triton.jit
def row_chunks(
    scores,  # [N, C] fp64: the greatest of the chunk
    tokens,  # [N, C] int32: where it is
    sums,  # [N, C] fp64: Σ exp((x - m)/T), under rejection
    logits,  # [N, V]
    owners,  # [N] int64
    kinds,  # [S] int64
    temperature,  # [S] fp32
    edges,  # [N] fp32, of find_cuts
    ties,  # [N] int32
    noise_keys,  # [N] int64
    row_stride,
    vocabulary,
    CHUNK: tl.constexpr,
    HAS_CUTS: tl.constexpr,
):
    """What each chunk of each row says."""
    at = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    owner = tl.load(owners + at)
    kind = tl.load(kinds + owner)
    place = at * tl.num_programs(1) + chunk
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    x = _values(logits + at * row_stride, i, vocabulary)
    if HAS_CUTS:
        x = tl.where(_kept(x, i, tl.load(edges + at), tl.load(ties + at)), x, _NOTHING)
    scale = 1.0 / tl.load(temperature + owner)
    score = x.to(tl.float64)
    if (kind != _GREEDY) & (kind != _INDEPENDENT):
        score = score * scale.to(tl.float64) + gumbel(tl.load(noise_keys + at), i.to(tl.int64))
    best = tl.max(score, 0)
    tl.store(scores + place, best)
    tl.store(tokens + place, tl.min(tl.where(score == best, i, vocabulary - 1), 0))
    if kind == _INDEPENDENT:
        # a chunk of which nothing is kept: its weights are 0, not exp(-inf + inf)
        base = tl.where(best == _NOTHING, 0.0, best).to(tl.float32)
        tl.store(sums + place, tl.sum(tl.exp((x - base) * scale).to(tl.float64), 0))


@triton.jit
def _weight(x, i, edge, tie, top, scale):  # -> fp64
    weight = tl.exp((x.to(tl.float64) - top) * scale)
    return tl.where(_kept(x, i, edge, tie), weight, 0.0)


@triton.jit(do_not_specialize=["K"])  # lest sums were ordered by how wide a batch's laws are
def decide(
    verdicts,  # [2, S] int64: how many stand, and what follows them
    scores,  # [N, C] fp64, of row_chunks
    tokens,  # [N, C] int32
    sums,  # [N, C] fp64
    logits,  # [N, V]
    starts,  # [S + 1] int64: the first row of each sequence
    kinds,  # [S] int64
    temperature,  # [S] fp32
    edges,  # [N] fp32
    ties,  # [N] int32
    drafts,  # [D] int64
    candidate_ids,  # [D, K] int64
    candidate_probs,  # [D, K] fp32
    accept_keys,  # [D] int64
    recover_keys,  # [S] int64
    row_stride,
    vocabulary,
    chunks,  # C
    K,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,  # judged at once
    HAS_CUTS: tl.constexpr,
):
    """The verdict on each sequence."""
    s = tl.program_id(0)
    first = tl.load(starts + s)
    drafted = (tl.load(starts + s + 1) - first - 1).to(tl.int32)
    first_draft = first - s
    rejecting = tl.load(kinds + s) == _INDEPENDENT
    scale = (1.0 / tl.load(temperature + s)).to(tl.float64)
    c = tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_K)
    member = tl.arange(0, ROWS)
    stand = 0
    token = 0
    going = 1
    while going == 1:
        j = stand + member
        judged = j < drafted
        row = first + j
        d = first_draft + j
        draft = tl.load(drafts + d, mask=judged, other=0)
        there = (j <= drafted)[:, None] & (c < chunks)[None, :]
        at = row[:, None] * chunks + c[None, :]
        score = tl.load(scores + at, mask=there, other=_NOTHING)
        best = tl.max(score, 1)
        if rejecting:
            total = tl.load(sums + at, mask=there, other=0.0)
            best = tl.where(best == _NOTHING, 0.0, best)  # of a row that is not there
            total = tl.sum(total * tl.exp((score - best[:, None]) * scale), 1)
            x = tl.load(logits + row * row_stride + draft, mask=judged, other=0.0).to(tl.float32)
            if HAS_CUTS:
                edge = tl.load(edges + row, mask=judged, other=0.0)
                tie = tl.load(ties + row, mask=judged, other=0)
            else:
                edge = tl.full([ROWS], _NOTHING, tl.float32)
                tie = tl.full([ROWS], 0, tl.int32) + vocabulary
            weight = _weight(x, draft, edge, tie, best, scale)  # p · total
            listed = judged[:, None] & (n < K)[None, :]
            ids = tl.load(candidate_ids + d[:, None] * K + n[None, :], mask=listed, other=-1)
            probs = tl.load(candidate_probs + d[:, None] * K + n[None, :], mask=listed, other=0.0)
            q = tl.sum(tl.where(ids == draft[:, None], probs.to(tl.float64), 0.0), 1)
            # u·q < p rather than u < p/q: the same test, and q = 0 needs no special case
            draw = uniform(tl.load(accept_keys + d, mask=judged, other=0))
            stands = draw * q * total < weight
            choice = draft.to(tl.int32)
        else:
            winner = tl.load(tokens + at, mask=there, other=vocabulary - 1)
            winner = tl.where(score == best[:, None], winner, vocabulary - 1)
            choice = tl.min(winner, 1)
            stands = choice == draft
        step = tl.min(tl.where(judged & stands, ROWS, member), 0)
        stand += step
        token = tl.sum(tl.where(member == step, choice, 0), 0)
        going = tl.where(step == ROWS, 1, 0)
    tl.store(verdicts + s, stand)
    following = verdicts + tl.num_programs(0) + s
    if rejecting == 0:
        tl.store(following, token)
        return

    row = first + stand
    x_row = logits + row * row_stride
    if HAS_CUTS:
        edge = tl.load(edges + row)
        tie = tl.load(ties + row)
    else:
        edge = -float("inf")
        tie = vocabulary
    score = tl.load(scores + row * chunks + c, mask=c < chunks, other=_NOTHING)
    best = tl.max(score, 0)
    mass = tl.load(sums + row * chunks + c, mask=c < chunks, other=0.0)
    top = tl.where(best == _NOTHING, 0.0, best)
    mass = mass * tl.exp((score - top) * scale)
    total = tl.sum(mass, 0)
    total = tl.where(total == 0.0, 1.0, total)
    mass = mass / total

    d = first_draft + stand
    candidates = tl.where(stand < drafted, K, 0)
    listed = n < candidates
    ids = tl.load(candidate_ids + d * K + n, mask=listed, other=-1).to(tl.int32)
    probs = tl.load(candidate_probs + d * K + n, mask=listed, other=0.0).to(tl.float64)
    same = ids[:, None] == ids[None, :]
    q = tl.sum(tl.where(same, probs[None, :], 0.0), 1)
    # an id that comes twice counts once, with all of its probability
    again = tl.sum((same & (n[None, :] < n[:, None])).to(tl.int32), 1) > 0
    share = _weight(_values(x_row, ids, vocabulary), ids, edge, tie, top, scale) / total
    share = tl.where(listed & (again == 0), tl.minimum(share, q), 0.0)
    left = 1.0 - tl.sum(share, 0)
    # p = q up to rounding leaves nothing: then p itself is the residual's limit
    some = left > _LEFT
    share = tl.where(some, share, 0.0)
    left = tl.where(some, left, 1.0)
    candidates = tl.where(some, candidates, 0)
    home = ids // CHUNK
    mass -= tl.sum(tl.where(home[None, :] == c[:, None], share[None, :], 0.0), 1)
    mass = tl.maximum(mass, 0.0)
    until = uniform(tl.load(recover_keys + s)) * left
    reached = tl.cumsum(mass, 0)
    # where rounding left the draw past the end, the last chunk that has anything
    last = tl.max(tl.where(mass > 0.0, c, 0), 0)
    chunk = tl.min(tl.where((reached > until) & (mass > 0.0), c, last), 0)
    so_far = tl.sum(tl.where(c < chunk, mass, 0.0), 0)
    chosen = -1
    while (chosen < 0) & (chunk < chunks):
        i = chunk * CHUNK + tl.arange(0, CHUNK)
        rest = _weight(_values(x_row, i, vocabulary), i, edge, tie, top, scale) / total
        for k in range(candidates):
            share_k = tl.load(candidate_probs + d * K + k).to(tl.float64)
            rest -= tl.where(i == tl.load(candidate_ids + d * K + k), share_k, 0.0)
        rest = tl.maximum(rest, 0.0)
        passed = (so_far + tl.cumsum(rest, 0) > until) & (rest > 0.0)
        found = tl.min(tl.where(passed, i, vocabulary), 0)
        final = tl.max(tl.where(rest > 0.0, i, -1), 0)
        chosen = tl.where(found < vocabulary, found, final)
        chunk += 1
    if chosen < 0:  # rounding left no weight at all: the likeliest
        winner = tl.load(tokens + row * chunks + c, mask=c < chunks, other=0)
        chosen = tl.min(tl.where((score == best) & (c < chunks), winner, vocabulary - 1), 0)
    tl.store(following, chosen)


def judge(
    logits: torch.Tensor,  # [N, V] fp32, bf16 or fp16
    lengths: Sequence[int],  # S: drafts of each sequence, which has one row more
    drafts: torch.Tensor,  # [D] int64, on the host like all that follows
    candidate_ids: torch.Tensor,  # [D, K] int64
    candidate_probs: torch.Tensor,  # [D, K] fp32
    rules: JudgeRules,
) -> torch.Tensor:  # [2, S] int64, on the device of the logits
    """How many drafts of each sequence stand, and the token that follows them."""
    rows, vocabulary = logits.shape
    sequences, k = len(lengths), candidate_ids.shape[1]
    counts = torch.tensor(lengths, dtype=torch.int64) + 1
    starts = torch.zeros(sequences + 1, dtype=torch.int64)
    starts[1:] = counts.cumsum(0)
    _check(logits, int(starts[-1]), sequences, drafts, candidate_ids, candidate_probs, rules)
    cutting = ((rules.top_k > 0) & (rules.top_k < vocabulary)) | (rules.top_p < 1.0)
    has_cuts = bool((cutting & (rules.kinds != GREEDY)).any())
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    (
        starts, owners, kinds, temperature, top_k, top_p, drafts, candidate_ids, candidate_probs,
        accept_keys, recover_keys, noise_keys,
    ) = to_device(
        [
            starts, torch.arange(sequences).repeat_interleave(counts), rules.kinds,
            rules.temperature, rules.top_k, rules.top_p, drafts, candidate_ids.contiguous(),
            candidate_probs.contiguous(), rules.accept_keys, rules.recover_keys, rules.noise_keys,
        ],
        logits.device,
    )  # fmt: skip
    chunks = -(-vocabulary // CHUNK)
    scores = logits.new_empty(rows, chunks, dtype=torch.float64)
    sums = torch.empty_like(scores)
    tokens = torch.empty_like(scores, dtype=torch.int32)
    edges = logits.new_empty(rows, dtype=torch.float32)
    ties = torch.empty_like(edges, dtype=torch.int32)
    verdicts = logits.new_empty(2, sequences, dtype=torch.int64)
    if has_cuts:
        launch(
            find_cuts, (rows,),
            edges, ties, logits, owners, kinds, temperature, top_k, top_p,
            logits.stride(0), vocabulary,
            ZERO_BITS=ZERO_BITS[logits.dtype], WAYS=WAYS, BLOCK=4096, num_warps=16,
        )  # fmt: skip
    launch(
        row_chunks, (rows, chunks),
        scores, tokens, sums, logits, owners, kinds, temperature, edges, ties, noise_keys,
        logits.stride(0), vocabulary,
        CHUNK=CHUNK, HAS_CUTS=has_cuts, num_warps=4,
    )  # fmt: skip
    launch(
        decide, (sequences,),
        verdicts, scores, tokens, sums, logits, starts, kinds, temperature, edges, ties, drafts,
        candidate_ids, candidate_probs, accept_keys, recover_keys,
        logits.stride(0), vocabulary, chunks, k,
        CHUNK=CHUNK, BLOCK_C=triton.next_power_of_2(chunks),
        BLOCK_K=max(64, triton.next_power_of_2(k)), ROWS=16, HAS_CUTS=has_cuts, num_warps=8,
    )  # fmt: skip
    return verdicts


def _check(
    logits: torch.Tensor,
    rows: int,
    sequences: int,
    drafts: torch.Tensor,
    candidate_ids: torch.Tensor,
    candidate_probs: torch.Tensor,
    rules: JudgeRules,
) -> None:
    """A kernel reads what it is told to: ValueError if that is not there."""
    vocabulary, total, k = logits.shape[1], rows - sequences, candidate_ids.shape[1]
    if logits.dtype not in ZERO_BITS:
        raise ValueError(f"logits must be fp32, bf16 or fp16; got {logits.dtype}")
    for name, tensor, shape, dtype in (
        ("logits", logits, (rows, vocabulary), logits.dtype),
        ("drafts", drafts, (total,), torch.int64),
        ("candidate_ids", candidate_ids, (total, k), torch.int64),
        ("candidate_probs", candidate_probs, (total, k), torch.float32),
        ("kinds", rules.kinds, (sequences,), torch.int64),
        ("temperature", rules.temperature, (sequences,), torch.float32),
        ("top_k", rules.top_k, (sequences,), torch.int64),
        ("top_p", rules.top_p, (sequences,), torch.float32),
        ("accept_keys", rules.accept_keys, (total,), torch.int64),
        ("recover_keys", rules.recover_keys, (sequences,), torch.int64),
        ("noise_keys", rules.noise_keys, (rows,), torch.int64),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            found = f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(f"{name} must be {shape} of {dtype}; got {found}")
    for ids in (drafts, candidate_ids):
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
            raise ValueError(f"draft tokens must lie in 0..{vocabulary - 1}")
