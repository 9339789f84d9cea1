"""The C++ operators on torch tensors: shapes and types are checked here, since nothing below does.

All tensors are contiguous, on the CPU, bf16 unless said. Symbols as in operators.cpp.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dspark.decoding.drawing import DrawnBlocks, DrawRules
from dspark.kernels.attention_plan import PAGE_SIZE, AttentionPlan
from dspark.kernels.cpu.library import load

LANES = 16  # widths must be multiples of it
HEAD_WIDTHS = (32, 64, 96, 128, 256)

_COLUMNS = 64
LAYER_TENSORS = (
    "input_norm", "qkv", "q_norm", "k_norm", "out", "mlp_norm", "gate_up", "down",
    "qkv_bias", "out_bias", "gate_up_bias", "down_bias",
)  # fmt: skip
_F, _I = ctypes.c_float, ctypes.c_int64


def available() -> bool:
    """Whether the operators can be had on this machine."""
    return load() is not None


def spread_threads() -> None:
    """Put the calling thread's OpenMP helpers on CPUs of their own, where the system does not."""
    library = load()
    if library is not None:
        library.dspark_spread()


def new_pages(num_pages: int, kv_heads: int, width: int) -> torch.Tensor:
    """Empty pages for keys or values: [pages, G, D · PAGE_SIZE], laid out by the kernels."""
    return torch.zeros(num_pages, kv_heads, width * PAGE_SIZE, dtype=torch.bfloat16)


def pack_linear(weight: torch.Tensor) -> torch.Tensor:  # [N, K] -> [⌈N/64⌉, K/2, 64, 2]
    """A weight laid out for `linear`; outputs past N are zero. K must be even.

    How the outputs of a group of 64 lie in it depends on the instruction set.
    """
    outputs, inputs = weight.shape
    library = load()
    assert library is not None, "ask available() first"
    block = LANES * library.dspark_block_vectors()
    groups = -(-outputs // _COLUMNS)
    padded = weight.new_zeros(groups * _COLUMNS, inputs)
    padded[:outputs] = weight
    packed = padded.view(-1, block, inputs // 2, 2).transpose(1, 2).contiguous()
    return packed.view(groups, inputs // 2, _COLUMNS, 2)


def pack_bias(bias: torch.Tensor) -> torch.Tensor:  # [N] -> [⌈N/64⌉·64] fp32
    """A bias laid out for `linear`."""
    return torch.nn.functional.pad(bias.float(), (0, -len(bias) % _COLUMNS))


def linear(
    x: torch.Tensor,  # [T, K]
    weight: torch.Tensor,  # of pack_linear
    bias: torch.Tensor | None,  # of pack_bias
    outputs: int,  # N
    dtype: torch.dtype = torch.bfloat16,  # of the result: bf16 or fp32
) -> torch.Tensor:  # [T, N]
    """x Wᵀ + bias."""
    rows, inputs = x.shape
    groups = -(-outputs // _COLUMNS)
    _expect(x, rows, inputs, multiple=2)
    _expect(weight, groups, inputs // 2, _COLUMNS, 2, multiple=2)
    if bias is not None:
        _expect(bias, groups * _COLUMNS, dtype=torch.float32)
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"linear gives bf16 or fp32, not {dtype}")
    out = x.new_empty(rows, outputs, dtype=dtype)
    wide = _I(dtype == torch.float32)
    _call("dspark_linear", x, weight, bias, out, wide, _I(rows), _I(outputs), _I(inputs))
    return out


def add_rms_norm(
    residual: torch.Tensor,  # [T, d], updated in place
    delta: torch.Tensor | None,  # [T, d]
    weight: torch.Tensor,  # [d]
    eps: float,
) -> torch.Tensor:  # [T, d]
    """residual += delta; returns rms_norm(residual) · weight."""
    rows, width = residual.shape
    _expect(residual, rows, width)
    _expect(weight, width)
    if delta is not None:
        _expect(delta, rows, width)
    out = torch.empty_like(residual)
    _call("dspark_add_rms_norm", residual, delta, weight, out, _I(rows), _I(width), _F(eps))
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:  # [T, 2I] -> [T, I]
    """silu(gate) · up."""
    rows, double = gate_up.shape
    _expect(gate_up, rows, double, multiple=2 * LANES)
    out = gate_up.new_empty(rows, double // 2)
    _call("dspark_silu_mul", gate_up, out, _I(rows), _I(double // 2))
    return out


def rotate_write(
    qkv: torch.Tensor,  # [T, (H + 2G)·D], queries and keys rotated in place
    cos: torch.Tensor,  # [T, D/2] fp32
    sin: torch.Tensor,  # [T, D/2] fp32
    norms: tuple[torch.Tensor, torch.Tensor] | None,  # [D] each, of queries and keys (Qwen3)
    eps: float,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,  # [T] int64
    heads: int,
    width: int,
) -> None:
    """Rotary embedding of queries and keys; keys and values go to their slots."""
    rows, kv_heads = len(qkv), keys.shape[1]
    _expect(qkv, rows, (heads + 2 * kv_heads) * width)
    _expect(cos, rows, width // 2, dtype=torch.float32)
    _expect(sin, rows, width // 2, dtype=torch.float32)
    _expect_pages(keys, values, kv_heads, width)
    _expect(slots, rows, dtype=torch.int64, multiple=1)
    q_norm, k_norm = norms if norms is not None else (None, None)
    for norm in (q_norm, k_norm):
        if norm is not None:
            _expect(norm, width)
    _call(
        "dspark_rotate_write", qkv, cos, sin, q_norm, k_norm, _F(eps), keys, values, slots,
        _I(rows), _I(heads), _I(kv_heads), _I(width),
    )  # fmt: skip


def write(
    key: torch.Tensor,  # [T, G, D]
    value: torch.Tensor,  # [T, G, D]
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,  # [T] int64
) -> None:
    """Keys and values go to their slots."""
    rows, kv_heads, width = key.shape
    _expect(key, rows, kv_heads, width)
    _expect(value, rows, kv_heads, width)
    _expect_pages(keys, values, kv_heads, width)
    _expect(slots, rows, dtype=torch.int64, multiple=1)
    _call("dspark_write", key, value, keys, values, slots, _I(rows), _I(kv_heads), _I(width))


def attention(
    query: torch.Tensor,  # [T, ≥ H·D]: each row begins with its query heads
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: AttentionPlan,
    heads: int,
    width: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [H] fp32
) -> torch.Tensor:  # [T, H·D]
    """softmax(scale · q kᵀ) v over each sequence's visible keys."""
    rows, kv_heads = len(query), keys.shape[1]
    _expect(query, rows, query.shape[1])
    _expect_pages(keys, values, kv_heads, width)
    _expect(plan.reach, rows, dtype=torch.int64, multiple=1)
    if query.shape[1] < heads * width or heads % kv_heads or width not in HEAD_WIDTHS:
        raise ValueError(
            f"no attention for {heads} heads of {width} over {kv_heads} in rows of {query.shape[1]}"
        )
    if sinks is not None:
        _expect(sinks, heads, dtype=torch.float32, multiple=1)
    out = query.new_empty(rows, heads * width)
    tables = plan.tables
    _call(
        "dspark_attention", query, _I(query.shape[1]), keys, values, out, plan.reach,
        plan.row_starts, tables, _I(tables.shape[1]), sinks, _I(len(tables)), _I(heads),
        _I(kv_heads), _I(width), _F(scale), _F(softcap or 0.0), plan.first_seen(window),
    )  # fmt: skip
    return out


class _JudgeStruct(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "logits", "row_starts", "rules", "temperature", "top_p", "top_k", "drafts",
                "candidate_ids", "candidate_probs", "accept_keys", "recover_keys", "noise_keys",
                "accepted", "next",
            )
        ),
        *((name, _I) for name in ("S", "V", "K")),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class JudgeRules:
    """How each of S sequences decides its tokens. Keys that a sequence has no use for are 0."""

    kinds: torch.Tensor  # [S] int64: GREEDY, INDEPENDENT (rejection) or COUPLED
    temperature: torch.Tensor  # [S] fp32, above 0
    top_k: torch.Tensor  # [S] int64, 0: off
    top_p: torch.Tensor  # [S] fp32
    accept_keys: torch.Tensor  # [D] int64
    recover_keys: torch.Tensor  # [S] int64
    noise_keys: torch.Tensor  # [N] int64


def judge(
    logits: torch.Tensor,  # [N, V] fp32
    lengths: Sequence[int],  # S: drafts of each sequence, which has one row more
    drafts: torch.Tensor,  # [D] int64
    candidate_ids: torch.Tensor,  # [D, K] int64
    candidate_probs: torch.Tensor,  # [D, K] fp32
    rules: JudgeRules,
) -> tuple[torch.Tensor, torch.Tensor]:  # [S], [S] int64
    """How many drafts of each sequence stand, and the token that follows them."""
    rows, vocabulary = logits.shape
    sequences, total = len(lengths), sum(lengths)
    k = candidate_ids.shape[1]
    starts = torch.zeros(sequences + 1, dtype=torch.int64)
    starts[1:] = (torch.tensor(lengths) + 1).cumsum(0)
    _expect(logits, total + sequences, vocabulary, dtype=torch.float32, multiple=1)
    _expect(drafts, total, dtype=torch.int64, multiple=1)
    _expect(candidate_ids, total, k, dtype=torch.int64, multiple=1)
    _expect(candidate_probs, total, k, dtype=torch.float32, multiple=1)
    for ids in (rules.kinds, rules.top_k, rules.recover_keys):
        _expect(ids, sequences, dtype=torch.int64, multiple=1)
    for numbers in (rules.temperature, rules.top_p):
        _expect(numbers, sequences, dtype=torch.float32, multiple=1)
    _expect(rules.accept_keys, total, dtype=torch.int64, multiple=1)
    _expect(rules.noise_keys, rows, dtype=torch.int64, multiple=1)
    for ids in (drafts, candidate_ids):
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
            raise ValueError(f"draft tokens must lie in 0..{vocabulary - 1}")
    accepted, following = torch.empty(2, sequences, dtype=torch.int64)
    tensors = (
        logits, starts, rules.kinds, rules.temperature, rules.top_p, rules.top_k, drafts,
        candidate_ids, candidate_probs, rules.accept_keys, rules.recover_keys, rules.noise_keys,
        accepted, following,
    )  # fmt: skip
    struct = _JudgeStruct(*(tensor.data_ptr() for tensor in tensors), sequences, vocabulary, k)
    library = load()
    assert library is not None, "ask available() first"
    library.dspark_judge(ctypes.byref(struct))
    return accepted, following


class _BlockStruct(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "logits", "hidden", "w1", "w2", "confidence", "vocabulary", "anchors", "rules",
                "temperature", "top_p", "top_k", "keys", "tokens", "scores", "candidate_ids",
                "candidate_probs",
            )
        ),
        *((name, _I) for name in ("S", "B", "V", "d", "r", "K")),
        ("confidence_bias", _F),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class BlockHead:
    """The sequential head's weights."""

    w1: torch.Tensor  # [V_t, r]
    w2: torch.Tensor  # of pack_linear, [V, r]
    confidence: torch.Tensor  # [d + r]
    confidence_bias: float
    vocabulary: torch.Tensor  # [V] int64, draft id -> target id


def draw_blocks(
    logits: torch.Tensor,  # [S, B, V] fp32, the Markov bias is added in place
    hidden: torch.Tensor,  # [S, B, d]
    anchors: torch.Tensor,  # [S] int64
    head: BlockHead,
    rules: DrawRules,
    candidates: int,  # K
) -> DrawnBlocks:
    """Left to right: Markov bias, draw, confidence (paper §3.1, §3.2)."""
    sessions, size, vocabulary = logits.shape
    width, rank = hidden.shape[-1], head.w1.shape[1]
    _expect(logits, sessions, size, vocabulary, dtype=torch.float32, multiple=1)
    _expect(hidden, sessions, size, width)
    _expect(head.w1, len(head.w1), rank)
    _expect(head.w2, -(-vocabulary // _COLUMNS), rank // 2, _COLUMNS, 2, multiple=2)
    _expect(head.confidence, width + rank)
    _expect(head.vocabulary, vocabulary, dtype=torch.int64, multiple=1)
    for ids in (anchors, rules.kinds, rules.top_k):
        _expect(ids, sessions, dtype=torch.int64, multiple=1)
    for numbers in (rules.temperature, rules.top_p):
        _expect(numbers, sessions, dtype=torch.float32, multiple=1)
    _expect(rules.keys, sessions, size, dtype=torch.int64, multiple=1)
    if int(anchors.min()) < 0 or int(anchors.max()) >= len(head.w1):
        raise ValueError(f"anchors must lie in 0..{len(head.w1) - 1}; got {anchors.tolist()}")
    k = min(candidates, vocabulary)
    out = DrawnBlocks(
        tokens=torch.empty(sessions, size, dtype=torch.int64),
        confidence_logits=torch.empty(sessions, size),
        candidate_ids=torch.zeros(sessions, size, k, dtype=torch.int64),
        candidate_probs=torch.zeros(sessions, size, k),
    )
    tensors = (
        logits, hidden, head.w1, head.w2, head.confidence, head.vocabulary, anchors, rules.kinds,
        rules.temperature, rules.top_p, rules.top_k, rules.keys, out.tokens, out.confidence_logits,
        out.candidate_ids, out.candidate_probs,
    )  # fmt: skip
    block = _BlockStruct(
        *(tensor.data_ptr() for tensor in tensors),
        sessions, size, vocabulary, width, rank, k, head.confidence_bias,
    )  # fmt: skip
    library = load()
    assert library is not None, "ask available() first"
    library.dspark_block(ctypes.byref(block))
    return out


class _LayerStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*LAYER_TENSORS, "keys", "values", "seen_from")),
    )


class _StepStruct(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "x", "delta", "h", "qkv", "mixed", "gate_up", "act",
                "cos", "sin", "reach", "slots", "row_starts", "tables",
            )
        ),
        *((name, _I) for name in ("table_width", "T", "S", "d", "H", "G", "D", "I")),
        ("eps", _F),
        ("scale", _F),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What all layers of a decoder have in common."""

    hidden: int  # d
    intermediate: int  # I
    heads: int  # H
    kv_heads: int  # G
    width: int  # D
    eps: float
    scale: float  # of attention scores


class DecoderLayers:
    """Layers of Llama's shape, ready to run one after the other without Python in between."""

    def __init__(
        self,
        shape: DecoderShape,
        layers: Sequence[Mapping[str, torch.Tensor | None]],  # by LAYER_TENSORS, for each layer
        windows: Sequence[int | None],
    ) -> None:
        self.shape = shape
        d, inner = shape.hidden, shape.intermediate
        rows_in = shape.heads * shape.width
        rows_qkv = rows_in + 2 * shape.kv_heads * shape.width
        linears = {"qkv": (d, rows_qkv), "out": (rows_in, d), "gate_up": (d, 2 * inner),
                   "down": (inner, d)}  # fmt: skip
        norms = {"input_norm": d, "mlp_norm": d, "q_norm": shape.width, "k_norm": shape.width}
        for layer in layers:
            for name, (inputs, outputs) in linears.items():
                groups = -(-outputs // _COLUMNS)
                weight, bias = layer[name], layer[f"{name}_bias"]
                assert weight is not None
                _expect(weight, groups, inputs // 2, _COLUMNS, 2, multiple=2)
                if bias is not None:
                    _expect(bias, groups * _COLUMNS, dtype=torch.float32)
            for name, size in norms.items():
                norm = layer[name]
                if norm is not None:
                    _expect(norm, size)
        self._windows = windows
        self._held = layers  # the structs below point into these
        self._pages: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(layers)
        self._structs = (_LayerStruct * len(layers))()
        for struct, layer in zip(self._structs, layers, strict=True):
            for name in LAYER_TENSORS:
                setattr(struct, name, _address(layer[name]))

    def run(
        self,
        first: int,
        last: int,
        x: torch.Tensor,  # [T, d] the residual, updated in place
        delta: torch.Tensor,  # [T, d] what is yet to be added to it, before and after
        cos: torch.Tensor,  # [T, D/2] fp32
        sin: torch.Tensor,  # [T, D/2] fp32
        plan: AttentionPlan,
        pages: Sequence[tuple[torch.Tensor, torch.Tensor]],  # keys and values of these layers
        *,
        fresh: bool,  # nothing is yet to be added
    ) -> None:
        """Run layers `first` to `last` - 1."""
        shape, rows = self.shape, len(x)
        _expect(x, rows, shape.hidden)
        _expect(delta, rows, shape.hidden)
        for table in (cos, sin):
            _expect(table, rows, shape.width // 2, dtype=torch.float32)
        _expect(plan.reach, rows, dtype=torch.int64, multiple=1)
        _expect(plan.slots, rows, dtype=torch.int64, multiple=1)
        for i, (keys, values) in zip(range(first, last), pages, strict=True):
            struct = self._structs[i]
            struct.seen_from = _address(plan.first_seen(self._windows[i]))
            held = self._pages[i]
            if held is not None and held[0] is keys and held[1] is values:
                continue  # the same cache as in the last step
            _expect_pages(keys, values, shape.kv_heads, shape.width)
            struct.keys, struct.values = keys.data_ptr(), values.data_ptr()
            self._pages[i] = keys, values
        mixed = shape.heads * shape.width
        widths = (shape.hidden, mixed + 2 * shape.kv_heads * shape.width, mixed,
                  2 * shape.intermediate, shape.intermediate)  # fmt: skip
        scratch = x.new_empty(rows * sum(widths)).split([rows * width for width in widths])
        tables = plan.tables
        tensors = (
            x,
            delta,
            *scratch,
            cos,
            sin,
            plan.reach,
            plan.slots,
            plan.row_starts,
            tables,
        )
        step = _StepStruct(
            *(tensor.data_ptr() for tensor in tensors),
            tables.shape[1], rows, len(tables), shape.hidden, shape.heads, shape.kv_heads,
            shape.width, shape.intermediate, shape.eps, shape.scale,
        )  # fmt: skip
        at = ctypes.byref(self._structs, first * ctypes.sizeof(_LayerStruct))
        library = load()
        assert library is not None, "ask available() first"
        if library.dspark_layers(ctypes.byref(step), at, _I(last - first), _I(fresh)):
            raise ValueError(f"no attention for heads of {shape.width} was compiled")


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(name: str, *arguments: Any) -> None:
    library = load()
    assert library is not None, "ask available() first"
    status = getattr(library, name)(
        *(
            ctypes.c_void_p(None if a is None else a.data_ptr())
            if a is None or isinstance(a, torch.Tensor)
            else a
            for a in arguments
        )
    )
    if name == "dspark_attention" and status:
        raise ValueError("no attention of this head width was compiled")


def _expect(
    tensor: torch.Tensor,
    *shape: int,
    dtype: torch.dtype = torch.bfloat16,
    multiple: int = LANES,
) -> None:
    if (
        tensor.shape != shape
        or tensor.dtype != dtype
        or tensor.device.type != "cpu"
        or not tensor.is_contiguous()
        or shape[-1] % multiple
    ):
        raise ValueError(
            f"expected a contiguous {dtype} tensor of {shape} on the CPU, width a multiple of "
            f"{multiple}; got {tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}, on "
            f"{tensor.device}"
        )


def _expect_pages(keys: torch.Tensor, values: torch.Tensor, kv_heads: int, width: int) -> None:
    for pages in (keys, values):
        _expect(pages, len(keys), kv_heads, width * PAGE_SIZE)
