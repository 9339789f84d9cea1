"""The whole engine on Triton's kernels, as on a GPU: what runs, and that drafts change nothing."""

from __future__ import annotations

import pytest
from helpers.tiny import run, tiny_drafter, tiny_engine, tiny_target

from dspark.types import Request, SamplingParams, VerifyMode

pytest.importorskip("triton")
from dspark.kernels.triton.launch import launches

TOKENS = 6
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=TOKENS),
    "coupled": SamplingParams(
        temperature=0.8, top_p=0.9, max_tokens=TOKENS, mode=VerifyMode.COUPLED, seed=3
    ),
    "rejection": SamplingParams(temperature=1.0, max_tokens=TOKENS, seed=4),
}


def test_drafts_change_nothing_and_every_kernel_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DSPARK_KERNELS", "triton")
    target = tiny_target("qwen3")
    requests = [
        Request(name, (1, 2, 3 + i), sampling)
        for i, (name, sampling) in enumerate(SAMPLINGS.items())
    ]
    plain = run(tiny_engine(target), requests)
    assert plain.drafted == 0
    launches.clear()
    drafted = run(tiny_engine(target, tiny_drafter(target)), requests, budget_seed=1)
    assert drafted.verified > TOKENS, "INCONCLUSIVE: hardly anything was drafted"
    for name in ("greedy", "coupled"):  # under rejection, other draws decide
        assert drafted.tokens[name] == plain.tokens[name]
    assert len(drafted.tokens["rejection"]) == TOKENS
    assert {kernel for kernel, count in launches.items() if count} >= {
        "attend_tiles", "rotate_write_kernel", "add_rms_norm_kernel", "silu_mul_kernel",
        "narrow_kernel", "find_cuts", "row_chunks", "decide", "position_logits", "draw_position",
    }  # fmt: skip
