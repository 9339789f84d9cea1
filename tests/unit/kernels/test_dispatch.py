"""What serves a layer's cache, and that it is said."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from dspark.errors import ConfigError
from dspark.kernels import dispatch
from dspark.kernels.dispatch import CpuStore, RowStore, TritonStore, new_store

CPU = torch.device("cpu")


def store_of(width: int, dtype: torch.dtype = torch.float32) -> object:
    rows = torch.zeros(1, 2, width, dtype=dtype)
    return new_store(2, rows, rows, CPU)


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    dispatch._explain.cache_clear()


def test_a_cpu_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSPARK_KERNELS", raising=False)
    assert type(store_of(64)) is RowStore
    if dispatch.operators.available():
        assert type(store_of(64, torch.bfloat16)) is CpuStore
    monkeypatch.setenv("DSPARK_KERNELS", "reference")
    assert type(store_of(64, torch.bfloat16)) is RowStore


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted there")
def test_what_triton_does_not_serve_falls_to_the_reference_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("DSPARK_KERNELS", "triton")
    caplog.set_level(logging.INFO, logger=dispatch.__name__)
    assert type(store_of(128)) is TritonStore
    assert "heads of 128 on cpu: Triton kernels" in caplog.text
    for _ in range(3):
        assert type(store_of(512)) is RowStore
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "heads of 512 on cpu: the torch reference" in warnings[0].getMessage()


def test_a_choice_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_KERNELS", "cuda")
    with pytest.raises(ConfigError, match="auto, triton or reference; got 'cuda'"):
        store_of(64)
    monkeypatch.setenv("DSPARK_KERNELS", "triton")
    monkeypatch.setattr(dispatch, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="Triton is not installed"):
        store_of(64)


def test_without_triton_everything_runs_on_the_reference() -> None:
    """A process that cannot import it, and no import of ours that tries to."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from helpers.tiny import run, tiny_drafter, tiny_engine, tiny_target
from dspark.types import Request, SamplingParams
target = tiny_target()
tally = run(
    tiny_engine(target, tiny_drafter(target)),
    [Request("a", (1, 2, 3), SamplingParams(temperature=0.0, max_tokens=6))],
)
assert len(tally.tokens["a"]) == 6 and tally.drafted
assert not any(name.startswith("dspark.kernels.triton") for name in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("DSPARK_KERNELS", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
