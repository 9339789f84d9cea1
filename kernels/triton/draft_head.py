"""The sequential head and the draw, position by position, on a GPU (paper §3.1, §3.2).

    logits_k = U_k + code_k W2,   code_k = W1[x_{k-1}], or what torch makes of it
    x_k ~ the K likeliest tokens' law (dspark.decoding.law.proposal_law)
    confidence_k = w · [h_k ; W1[x_{k-1}]] + b

Two kernels a position. The first adds the bias, and notes the largest logit of each chunk of the
vocabulary. The K likeliest tokens lie in the K chunks with the largest such maxima, so that the
second, one program a session, reads those chunks alone. Both order equal logits by token: what
comes out is one list, on any device, whoever else drafts.

Laws are computed in fp64: there are K numbers of them, and the draw decides by their sums.

Nothing waits for the device or reads from it, and shapes depend on those of the arguments alone:
a whole block can be captured into one graph.

Symbols: S sessions, B block size, V target vocabulary, V_d draft vocabulary, C chunks of it, d
width, r rank, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from dspark.decoding.drawing import DrawnBlocks, DrawRules, likeliest_logit
from dspark.kernels.triton.launch import INTERPRETED, launch
from dspark.kernels.triton.noise import gumbel, uniform

MOST_CANDIDATES = 64
CHUNK = 64  # tokens: K chunks' logits are then as many numbers as a large vocabulary has chunks
BLOCK_S = 16  # sessions of a program, the least that a matrix unit multiplies
_NOTHING = tl.constexpr(-(1 << 62) - 1)  # below every number that _ordered makes


@triton.jit
def _ordered(logits, index):
    """int64 that rise with the logits and, where those are equal, fall with the index."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)  # -0 equals 0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (rising.to(tl.int64) << 31) + (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _index_of(ordered):
    return 0x7FFFFFFF - (ordered & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _logit_of(ordered):
    rising = (ordered >> 31).to(tl.int32)
    return (rising ^ ((rising >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _keep_largest(scratch, ordered, COUNT: tl.constexpr):
    """The COUNT largest to `scratch`, as they stand; there are as many, and no two are equal."""
    # By bisection: `low` and above there are `found` or more, `high` and above fewer than COUNT.
    low = tl.min(tl.where(ordered == _NOTHING, 0x7FFFFFFFFFFFFFFF, ordered), 0)
    high = tl.max(ordered, 0) + 1
    found = tl.sum((ordered >= low).to(tl.int32), 0)
    while found != COUNT:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        above = tl.sum((ordered >= middle).to(tl.int32), 0)
        enough = above >= COUNT
        low = tl.where(enough, middle, low)
        found = tl.where(enough, above, found)
        high = tl.where(enough, high, middle)
    kept = ordered >= low
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(scratch + place, ordered, mask=kept)
    tl.debug_barrier()  # what other threads of the program wrote can be read from here on


@triton.jit(do_not_specialize=["sessions", "size", "position"])
def position_logits(
    logits,  # [S, V_d] fp32, out
    maxima,  # [S, C] fp32, out
    base,  # [S, B, V_d]: U
    drawn,  # [S, 1 + B] int64: the anchor, then what has been drafted
    code,  # [S, r], rows `code_stride` apart, unless GATHER
    w1,  # [V, r]
    w2,  # [V_d, r]
    sessions,
    size,  # B
    position,  # k
    code_stride,
    VOCABULARY: tl.constexpr,  # V_d
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    RANK: tl.constexpr,  # 0: no bias
    BLOCK_R: tl.constexpr,
    GATHER: tl.constexpr,  # the code is W1[x_{k-1}]
    WIDE: tl.constexpr,  # products in fp32: the interpreter has no bf16 of its own
    PRECISION: tl.constexpr,
):
    # Programs of one chunk stand next to each other, so that W2 comes from memory once for all.
    session = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
    chunk = tl.program_id(1)
    there = session < sessions
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < VOCABULARY
    both = there[:, None] & inside[None, :]
    row = (session * size + position) * VOCABULARY
    x = tl.load(base + row[:, None] + token[None, :], mask=both, other=0.0).to(tl.float32)
    if RANK > 0:
        if GATHER:
            previous = tl.load(drawn + session * (size + 1) + position, mask=there, other=0)
            from_code = w1 + previous * RANK
        else:
            from_code = code + session * code_stride
        bias = tl.zeros([BLOCK_S, CHUNK], tl.float32)
        for start in range(0, RANK, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            a = tl.load(
                from_code[:, None] + r[None, :],
                mask=there[:, None] & (r < RANK)[None, :],
                other=0.0,
            )
            b = tl.load(
                w2 + token[None, :] * RANK + r[:, None],
                mask=inside[None, :] & (r < RANK)[:, None],
                other=0.0,
            )
            if WIDE:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            bias = tl.dot(a, b, bias, input_precision=PRECISION)
        x += bias
    tl.store(logits + session[:, None] * VOCABULARY + token[None, :], x, mask=both)
    highest = tl.max(tl.where(inside[None, :], x, -float("inf")), 1)
    tl.store(maxima + session * CHUNKS + chunk, highest, mask=there)


@triton.jit(do_not_specialize=["size", "position"])
def draw_position(
    drawn,  # [S, 1 + B] int64: the anchor, then what has been drafted; in and out
    scratch,  # [S, 3, K] int64, unless GREEDY
    candidate_ids,  # [S, B, K] int64, out, unless GREEDY
    candidate_probs,  # [S, B, K] fp32, out, unless GREEDY
    scores,  # [S, B] fp32, out, where there is a CONFIDENCE head
    logits,  # [S, V_d] fp32
    maxima,  # [S, C] fp32
    hidden,  # [S, B, d]
    w1,  # [V, r]
    confidence,  # [d], or [d + r]
    confidence_bias,  # [1]
    vocabulary,  # [V_d] int64, draft id -> target id
    kinds,  # [S] int64: 0 greedy, 1 independent draws, 2 coupled
    temperature,  # [S] fp32
    top_k,  # [S] int64
    top_p,  # [S] fp32
    keys,  # [S, B] int64
    size,  # B
    position,  # k
    VOCABULARY: tl.constexpr,  # V_d
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,  # powers of two
    CANDIDATES: tl.constexpr,  # K
    BLOCK_K: tl.constexpr,
    GREEDY: tl.constexpr,  # every session is
    CONFIDENCE: tl.constexpr,
    WIDTH: tl.constexpr,  # d
    BLOCK_D: tl.constexpr,
    RANK: tl.constexpr,  # of what the confidence head sees of W1; 0: nothing
    BLOCK_R: tl.constexpr,
):
    session = tl.program_id(0).to(tl.int64)
    at = session * size + position
    line = drawn + session * (size + 1) + position
    if CONFIDENCE:
        parts = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, WIDTH, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            h = tl.load(hidden + at * WIDTH + d, mask=d < WIDTH, other=0.0).to(tl.float32)
            w = tl.load(confidence + d, mask=d < WIDTH, other=0.0).to(tl.float32)
            parts += h * w
        score = tl.sum(parts, 0) + tl.load(confidence_bias).to(tl.float32)
        if RANK > 0:
            r = tl.arange(0, BLOCK_R)
            seen = tl.load(w1 + tl.load(line) * RANK + r, mask=r < RANK, other=0.0)
            w = tl.load(confidence + WIDTH + r, mask=r < RANK, other=0.0)
            score += tl.sum(seen.to(tl.float32) * w.to(tl.float32), 0)
        tl.store(scores + at, score)

    c = tl.arange(0, BLOCK_C)
    highest = tl.load(maxima + session * CHUNKS + c, mask=c < CHUNKS, other=0.0)
    highest = tl.where(c < CHUNKS, _ordered(highest, c), _NOTHING)
    of_session = logits + session * VOCABULARY
    if GREEDY:
        token = _index_of(tl.max(highest, 0)) * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(of_session + token, mask=token < VOCABULARY, other=0.0)
        x = tl.where(token < VOCABULARY, _ordered(x, token), _NOTHING)
        tl.store(line + 1, tl.load(vocabulary + _index_of(tl.max(x, 0))))
        return

    rank = tl.arange(0, BLOCK_K)
    real = rank < CANDIDATES
    scratch += session * (3 * CANDIDATES)
    READ: tl.constexpr = CANDIDATES if CANDIDATES < CHUNKS else CHUNKS
    _keep_largest(scratch, highest, READ)
    place = tl.arange(0, BLOCK_K * CHUNK)
    chunk = tl.load(scratch + place // CHUNK, mask=place // CHUNK < READ, other=_NOTHING)
    token = _index_of(chunk) * CHUNK + place % CHUNK
    inside = (chunk != _NOTHING) & (token < VOCABULARY)
    x = tl.load(of_session + token, mask=inside, other=0.0)
    scratch += CANDIDATES
    _keep_largest(scratch, tl.where(inside, _ordered(x, token), _NOTHING), CANDIDATES)
    some = tl.load(scratch + rank, mask=real, other=_NOTHING)
    others = tl.load(scratch + rank, mask=real, other=_NOTHING)
    before_it = tl.sum((others[None, :] > some[:, None]).to(tl.int32), 1)
    scratch += CANDIDATES
    tl.store(scratch + before_it, some, mask=real)
    tl.debug_barrier()
    best = tl.load(scratch + rank, mask=real, other=_NOTHING)

    ids = tl.load(vocabulary + _index_of(best), mask=real, other=0)
    value = tl.where(real, _logit_of(best), -float("inf")).to(tl.float64)
    top = tl.max(value, 0)
    below = tl.where(value == top, 0.0, value - top)  # not ∞ - ∞, where all are masked
    most = tl.load(top_k + session)
    kept = real & ((most <= 0) | (rank < most))
    weight = tl.where(kept, tl.exp(below / tl.load(temperature + session).to(tl.float64)), 0.0)
    share = weight / tl.sum(weight, 0)
    before = tl.cumsum(share, 0) - share
    mass = tl.load(top_p + session).to(tl.float64)
    weight = tl.where((rank == 0) | (before < mass), weight, 0.0)
    law = weight / tl.sum(weight, 0)

    kind = tl.load(kinds + session)
    key = tl.load(keys + at)
    # What is shipped is drawn from: the law as rounded.
    shipped = law.to(tl.float32)
    cdf = tl.cumsum(shipped.to(tl.float64), 0)
    draw = uniform(key) * tl.max(cdf, 0)
    last = tl.sum((shipped > 0.0).to(tl.int32), 0) - 1  # of a law that falls, and ends in zeros
    independent = tl.minimum(tl.sum((cdf <= draw).to(tl.int32), 0), last)
    there = law > 0.0
    noisy = tl.log(tl.where(there, law, 1.0)) + gumbel(key, ids)
    noisy = tl.where(there, noisy, -float("inf"))
    coupled = tl.min(tl.where(noisy == tl.max(noisy, 0), rank, BLOCK_K - 1), 0)
    chosen = tl.where(kind == 1, independent, tl.where(kind == 2, coupled, 0))
    tl.store(line + 1, tl.sum(tl.where(rank == chosen, ids, 0), 0))
    place = at * CANDIDATES + rank
    tl.store(candidate_ids + place, tl.where(kind == 1, ids, 0), mask=real)
    tl.store(candidate_probs + place, tl.where(kind == 1, shipped, 0.0), mask=real)


@dataclass(frozen=True, slots=True)
class DraftHead:
    """A sequential head and its confidence head, as kernels take them; all contiguous."""

    vocabulary: torch.Tensor  # [V_d] int64, draft id -> target id
    w1: torch.Tensor | None = None  # [V, r]; None: no bias
    w2: torch.Tensor | None = None  # [V_d, r]
    # From embeddings [S, r], hidden states [S, d] and a state to codes [S, r] and the next state;
    # None: the embedding is the code.
    step: (
        Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
        | None
    ) = None
    first_state: Callable[[int], torch.Tensor] | None = None  # of so many blocks, for `step`
    # [d], or [d + r] if it sees W1[x_{k-1}]; None: the likeliest token's chance takes its place.
    confidence: torch.Tensor | None = None
    confidence_bias: torch.Tensor | None = None  # [1]


def draw_blocks(
    base: torch.Tensor,  # [S, B, V_d]: U, capped if the target's is
    hidden: torch.Tensor,  # [S, B, d]
    anchors: torch.Tensor,  # [S] int64
    head: DraftHead,
    rules: DrawRules,  # on the device
    candidates: int,  # K, up to MOST_CANDIDATES
    *,
    greedy: bool = False,  # every session is, which is known on the host
) -> DrawnBlocks:
    """Left to right: bias, confidence, draw."""
    sessions, size, vocabulary = base.shape
    if candidates > MOST_CANDIDATES:
        raise ValueError(f"at most {MOST_CANDIDATES} candidates; got {candidates}")
    k = min(candidates, vocabulary)
    base, hidden = base.contiguous(), hidden.contiguous()
    rules = DrawRules(*(tensor.contiguous() for tensor in rules.tensors))
    drawn = anchors.new_empty(sessions, 1 + size)
    drawn[:, 0] = anchors
    chunks = triton.cdiv(vocabulary, CHUNK)
    logits = hidden.new_empty(sessions, vocabulary, dtype=torch.float32)
    maxima = hidden.new_empty(sessions, chunks, dtype=torch.float32)
    scratch = anchors.new_empty(sessions, 3, k)
    scores = hidden.new_empty(sessions, size, dtype=torch.float32)
    ids = anchors.new_zeros(sessions, size, k)
    probs = hidden.new_zeros(sessions, size, k, dtype=torch.float32)
    nothing = hidden  # for pointers that a variant does not follow
    rank = 0 if head.w1 is None else head.w1.shape[1]
    sees = 0 if head.confidence is None else len(head.confidence) - hidden.shape[2]
    state = None
    if head.step is not None:
        assert head.first_state is not None
        state = head.first_state(sessions)
    w1, w2 = (nothing if w is None else w for w in (head.w1, head.w2))
    for position in range(size):
        code, stride = nothing, 0
        if head.step is not None:
            assert state is not None
            code, state = head.step(F.embedding(drawn[:, position], w1), hidden[:, position], state)
            code = code.to(w2.dtype)
            code, stride = (code if code.stride(1) == 1 else code.contiguous()), code.stride(0)
        launch(
            position_logits,
            (triton.cdiv(sessions, BLOCK_S), chunks),
            logits, maxima, base, drawn, code, w1, w2,
            sessions, size, position, stride,
            VOCABULARY=vocabulary, CHUNKS=chunks, CHUNK=CHUNK, BLOCK_S=BLOCK_S,
            RANK=rank, BLOCK_R=min(64, max(16, triton.next_power_of_2(rank))),
            GATHER=head.step is None,
            WIDE=INTERPRETED and w2.dtype == torch.bfloat16,
            PRECISION="ieee" if w2.dtype == torch.float32 else "tf32",
            num_warps=4, num_stages=2,
        )  # fmt: skip
        launch(
            draw_position,
            (sessions,),
            drawn, scratch, ids, probs, scores, logits, maxima, hidden, w1,
            nothing if head.confidence is None else head.confidence,
            nothing if head.confidence_bias is None else head.confidence_bias,
            head.vocabulary, *rules.tensors, size, position,
            VOCABULARY=vocabulary, CHUNKS=chunks, CHUNK=CHUNK,
            BLOCK_C=triton.next_power_of_2(chunks),
            CANDIDATES=k, BLOCK_K=triton.next_power_of_2(k), GREEDY=greedy,
            CONFIDENCE=head.confidence is not None,
            WIDTH=hidden.shape[2], BLOCK_D=min(1024, triton.next_power_of_2(hidden.shape[2])),
            RANK=sees, BLOCK_R=triton.next_power_of_2(max(1, sees)),
            num_warps=8,
        )  # fmt: skip
        if head.confidence is None:
            scores[:, position] = likeliest_logit(logits)
    return DrawnBlocks(drawn[:, 1:].contiguous(), scores, ids, probs)
