"""The variants of every kernel that deployments run, for compiling them where there is no GPU.

A variant is what a launch at a certain shape compiles: types of the arguments, and values of those
that are known at compile time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dspark.kernels.attention_plan import PAGE_SIZE, TILE_ROWS
from dspark.kernels.triton import (
    acceptance,
    admission,
    attention,
    cache_write,
    draft_head,
    linear,
    rows,
)
from dspark.kernels.triton.launch import EARLY_FROM
from dspark.kernels.triton.launch_configs import config_for

CAPABILITIES = (75, 80, 86, 89, 90)
_FP8_FROM = 89
_FP8_SPILLS = 96  # bytes: it is scaled back in registers
_WITHOUT_TENSOR_CORES = 192  # bytes, of products on sm_75

Value = int | float | bool | str | None


@dataclass(frozen=True)
class Variant:
    """One compilation of one kernel."""

    name: str
    kernel: Any
    types: Mapping[str, str]  # of the arguments that are given at a launch, as Triton writes them
    values: Mapping[str, Value]  # of the others
    warps: int = 4
    stages: int = 1
    least_capability: int = 0
    spills: int = 0  # bytes of local memory that a thread may use

    def compiled(self, capability: int) -> Any:
        """Triton's result, for that GPU."""
        names = self.kernel.arg_names
        signature = {name: self.types.get(name, "constexpr") for name in names}
        # as launches find them: torch's tensors begin at multiples of 16 bytes
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name].startswith("*")
        }
        source = ASTSource(self.kernel, signature, dict(self.values), aligned)
        return triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": self.warps, "num_stages": self.stages},
        )


@dataclass(frozen=True, slots=True)
class Heads:
    """Of a family of models."""

    name: str
    heads: int
    kv_heads: int
    width: int


HEADS = (
    Heads("SmolLM2-135M", 9, 3, 64),
    Heads("Qwen3-8B", 32, 8, 128),
    Heads("Gemma-2-2B", 8, 4, 256),
)


def all_variants(capability: int) -> Iterator[Variant]:
    """What is compiled for one GPU: launch configurations differ."""
    for make in _MAKERS:
        for variant in make(capability):
            if capability >= variant.least_capability:
                yield variant


def _attention(capability: int) -> Iterator[Variant]:
    for heads in HEADS:
        for long in (False, True):
            yield _attend(heads, capability, long=long, kind="bf16")
    qwen, gemma = HEADS[1], HEADS[2]
    yield _attend(qwen, capability, long=False, kind="fp16")
    yield _attend(gemma, capability, long=False, kind="bf16", everything=True)
    yield _attend(qwen, capability, long=False, kind="fp8", key_type="*fp8e4nv", scales=True)
    yield Variant(
        "merge_stretches bf16 128",
        attention.merge_stretches,
        {
            "out": "*bf16", "partial": "*fp32", "partial_lse": "*fp32", "tile_first": "*i32",
            "tile_rows": "*i32", "reach": "*i64", "first_seen": "*i64", "sinks": "*fp32",
            "stretches": "i32",
        },
        {
            "HEADS": 32, "VALUE_WIDTH": 128, "BLOCK_V": 128, "STRETCH": 512,
            "HAS_FIRST": False, "HAS_SINKS": False, "EARLY": capability >= EARLY_FROM,
        },
        warps=1,
    )  # fmt: skip


def _attend(
    heads: Heads,
    capability: int,
    *,
    long: bool,
    kind: str,
    key_type: str | None = None,
    everything: bool = False,
    scales: bool = False,
) -> Variant:
    config = config_for("attention", capability, heads.width)
    fold = heads.heads // heads.kv_heads
    most_rows = max(1, config.long_rows // fold) if long else TILE_ROWS
    row_type = "*fp16" if kind == "fp16" else "*bf16"
    pointers = {
        "out": row_type, "partial": "*fp32", "partial_lse": "*fp32", "query": row_type,
        "keys": key_type or row_type, "values": key_type or row_type, "tile_first": "*i32",
        "tile_rows": "*i32", "tile_sequence": "*i32", "tables": "*i32", "reach": "*i64",
        "first_seen": "*i64", "sinks": "*fp32", "key_scales": "*fp32", "value_scales": "*fp32",
        "query_stride": "i32", "table_width": "i32", "stretches": "i32",
        "scale_log2": "fp32", "softcap": "fp32",
    }  # fmt: skip
    what = "prompt" if long else "block"
    return Variant(
        f"attend_tiles {heads.name} {kind} {what}" + (" all options" if everything else ""),
        attention.attend_tiles,
        pointers,
        {
            "HEADS": heads.heads, "KV_HEADS": heads.kv_heads, "WIDTH": heads.width,
            "VALUE_WIDTH": heads.width, "BLOCK_D": heads.width, "BLOCK_V": heads.width,
            "BLOCK_M": max(16, triton.next_power_of_2(most_rows * fold)),
            "BLOCK_N": config.long_block_keys if long else config.block_keys,
            "STRETCH": attention.ALL_KEYS if long else config.split_keys, "SPLIT": not long,
            "PAGE": PAGE_SIZE,
            "HAS_FIRST": everything, "HAS_SINKS": everything, "HAS_SOFTCAP": everything,
            "HAS_SCALES": scales, "WIDE": False, "PRECISION": "tf32",
            "EARLY": capability >= EARLY_FROM,
        },
        warps=config.long_warps if long else config.warps,
        stages=config.long_stages if long else config.stages,
        least_capability=_FP8_FROM if scales else 0,
        spills=_FP8_SPILLS if scales else 0,
    )  # fmt: skip


def _rows(capability: int) -> Iterator[Variant]:
    early: dict[str, Value] = {"EARLY": capability >= EARLY_FROM}
    yield Variant(
        "write_kernel bf16 128",
        cache_write.write_kernel,
        {
            "to_keys": "*bf16", "to_values": "*bf16", "keys": "*bf16", "values": "*bf16",
            "slots": "*i64", "key_scales": "*fp32", "value_scales": "*fp32", "key_row": "i32",
            "key_head": "i32", "value_row": "i32", "value_head": "i32",
        },
        {
            "KV_HEADS": 8, "WIDTH": 128, "VALUE_WIDTH": 128, "BLOCK_D": 128, "BLOCK_V": 128,
            "HAS_SCALES": False,
        },
        warps=1,
    )  # fmt: skip
    for heads in HEADS[:2]:
        yield Variant(
            f"rotate_write_kernel {heads.name} bf16",
            cache_write.rotate_write_kernel,
            {
                "qkv": "*bf16", "to_keys": "*bf16", "to_values": "*bf16", "slots": "*i64",
                "cos": "*fp32", "sin": "*fp32", "query_norm": "*bf16", "key_norm": "*bf16",
                "eps": "fp32",
            },
            {
                "HEADS": heads.heads, "KV_HEADS": heads.kv_heads, "WIDTH": heads.width,
                "BLOCK_H": heads.width // 2, "HAS_NORM": heads.width == 128, **early,
            },
            warps=1,
        )  # fmt: skip
    yield Variant(
        "add_rms_norm_kernel bf16 4096",
        rows.add_rms_norm_kernel,
        {
            "out": "*bf16", "residual": "*bf16", "delta": "*bf16", "weight": "*bf16",
            "eps": "fp32",
        },
        {"WIDTH": 4096, "BLOCK": 4096, "HAS_DELTA": True, **early},
        warps=8,
    )  # fmt: skip
    yield Variant(
        "silu_mul_kernel bf16 12288",
        rows.silu_mul_kernel,
        {"out": "*bf16", "gate_up": "*bf16"},
        {"WIDTH": 12_288, "BLOCK": 1024, **early},
    )


def _linear(capability: int) -> Iterator[Variant]:
    types = {"out": "*bf16", "x": "*bf16", "weight": "*bf16", "bias": "*bf16", "rows": "i32"}
    yield Variant(
        "linear_kernel bf16 4096 × 6144",
        linear.linear_kernel,
        types,
        {
            "OUTPUTS": 6144, "INPUTS": 4096, "BLOCK_T": linear.BLOCK_T, "BLOCK_N": linear.BLOCK_N,
            "BLOCK_K": linear.BLOCK_K, "HAS_BIAS": False, "WIDE": False, "PRECISION": "tf32",
        },
        warps=linear.WARPS,
        stages=linear.STAGES,
        least_capability=linear.LEAST_CAPABILITY,
    )  # fmt: skip
    for inputs, outputs in ((4096, 6144), (576, 960)):  # the latter with masks
        yield Variant(
            f"narrow_kernel bf16 {inputs} × {outputs}",
            linear.narrow_kernel,
            types,
            {
                "OUTPUTS": outputs, "INPUTS": inputs, "BLOCK_T": linear.NARROW_ROWS,
                "BLOCK_N": linear.NARROW_N, "BLOCK_K": linear.NARROW_K,
                "EVEN": outputs % linear.NARROW_N == 0 and inputs % linear.NARROW_K == 0,
                "HAS_BIAS": False, "WIDE": False, "PRECISION": "tf32",
                "EARLY": capability >= EARLY_FROM,
            },
            warps=linear.NARROW_WARPS,
            stages=linear.NARROW_STAGES[2],
            least_capability=linear.LEAST_CAPABILITY,
        )  # fmt: skip


def _drafting(capability: int) -> Iterator[Variant]:
    vocabulary, rank, width, candidates, chunk = 151_936, 256, 4096, 32, draft_head.CHUNK
    chunks = triton.cdiv(vocabulary, chunk)
    of_vocabulary: dict[str, Value] = {"VOCABULARY": vocabulary, "CHUNKS": chunks, "CHUNK": chunk}
    yield Variant(
        "position_logits bf16 151936 × 256",
        draft_head.position_logits,
        {
            "logits": "*fp32", "maxima": "*fp32", "base": "*bf16", "drawn": "*i64", "code": "*bf16",
            "w1": "*bf16", "w2": "*bf16", "sessions": "i32", "size": "i32", "position": "i32",
            "code_stride": "i32",
        },
        {
            **of_vocabulary, "BLOCK_S": draft_head.BLOCK_S, "RANK": rank, "BLOCK_R": 64,
            "GATHER": True, "WIDE": False, "PRECISION": "tf32",
        },
        stages=2,
        spills=_WITHOUT_TENSOR_CORES if capability < linear.LEAST_CAPABILITY else 0,
    )  # fmt: skip
    for greedy in (False, True):
        yield Variant(
            f"draw_position 151936, {'greedy' if greedy else f'{candidates} candidates'}",
            draft_head.draw_position,
            {
                "drawn": "*i64", "scratch": "*i64", "candidate_ids": "*i64",
                "candidate_probs": "*fp32", "scores": "*fp32", "logits": "*fp32",
                "maxima": "*fp32", "hidden": "*bf16", "w1": "*bf16", "confidence": "*bf16",
                "confidence_bias": "*bf16", "vocabulary": "*i64", "kinds": "*i64",
                "temperature": "*fp32", "top_k": "*i64", "top_p": "*fp32", "keys": "*i64",
                "size": "i32", "position": "i32",
            },
            {
                **of_vocabulary, "BLOCK_C": triton.next_power_of_2(chunks),
                "CANDIDATES": candidates, "BLOCK_K": candidates, "GREEDY": greedy,
                "CONFIDENCE": True, "WIDTH": width, "BLOCK_D": 1024, "RANK": rank, "BLOCK_R": rank,
            },
            warps=8,
        )  # fmt: skip
    yield Variant(
        "admit_kernel 512 × 15",
        admission.admit_kernel,
        {
            "admitted": "*i64", "survivals": "*fp32", "logits": "*fp32", "lengths": "*i64",
            "greedy": "*i64", "temperatures": "*fp32", "biases": "*fp32", "capacity": "*i64",
            "sessions": "i32", "size": "i32",
        },
        {
            "BLOCK_S": 512, "BLOCK_B": 16, "LEAST": admission.LEAST, "MOST": admission.MOST,
        },
        warps=16,
    )  # fmt: skip


def _accepting(capability: int) -> Iterator[Variant]:
    del capability
    vocabulary = 151_936
    chunks = triton.cdiv(vocabulary, acceptance.CHUNK)
    rows = {
        "logits": "*bf16", "owners": "*i64", "kinds": "*i64", "temperature": "*fp32",
        "edges": "*fp32", "ties": "*i32", "row_stride": "i32", "vocabulary": "i32",
    }  # fmt: skip
    found = {"scores": "*fp64", "tokens": "*i32", "sums": "*fp64"}
    yield Variant(
        "find_cuts bf16",
        acceptance.find_cuts,
        {**rows, "top_k": "*i64", "top_p": "*fp32"},
        {"ZERO_BITS": 16, "WAYS": 8, "BLOCK": 4096},
        warps=16,
    )
    for cuts in (False, True):
        what = "bf16, some rows cut" if cuts else "bf16"
        yield Variant(
            f"row_chunks {what}",
            acceptance.row_chunks,
            {**rows, **found, "noise_keys": "*i64"},
            {"CHUNK": acceptance.CHUNK, "HAS_CUTS": cuts},
        )
        yield Variant(
            f"decide {what}",
            acceptance.decide,
            {
                **rows, **found, "verdicts": "*i64", "starts": "*i64", "drafts": "*i64",
                "candidate_ids": "*i64", "candidate_probs": "*fp32", "accept_keys": "*i64",
                "recover_keys": "*i64", "chunks": "i32", "K": "i32",
            },
            {
                "CHUNK": acceptance.CHUNK, "BLOCK_C": triton.next_power_of_2(chunks),
                "BLOCK_K": 64, "ROWS": 16, "HAS_CUTS": cuts,
            },
            warps=8,
        )  # fmt: skip


_MAKERS: tuple[Callable[[int], Iterator[Variant]], ...] = (
    _attention, _rows, _linear, _drafting, _accepting,
)  # fmt: skip
