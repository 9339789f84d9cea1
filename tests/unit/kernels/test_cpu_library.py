"""The C++ operators are built once, and their absence costs speed and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dspark.errors import ConfigError
from dspark.kernels.cpu import library
from dspark.kernels.dispatch import RowStore, new_store


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    library.load.cache_clear()
    yield tmp_path / "operators"
    library.load.cache_clear()


def store_type() -> type:
    rows = torch.zeros(1, 2, 64, dtype=torch.bfloat16)
    return type(new_store(2, rows, rows, torch.device("cpu")))


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_build_is_used_again(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    library.load()
    (built,) = cache.glob("*.so")
    made = built.stat().st_mtime_ns
    assert "building" in caplog.text
    caplog.clear()
    library.load.cache_clear()
    library.load()
    assert built.stat().st_mtime_ns == made
    assert not caplog.text


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "/bin/false"])
def test_without_a_compiler_the_reference_serves(
    cache: Path, compiler: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert store_type() is RowStore
    assert store_type() is RowStore
    assert caplog.text.count("the slower torch path is used") == 1
    assert not list(cache.glob("*.so"))


def test_a_damaged_build_is_no_crash(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = cache / "x.so"
    damaged.parent.mkdir()
    damaged.write_bytes(b"not a library")
    monkeypatch.setattr(library, "_built", lambda _: damaged)
    assert library.load() is None
    assert "the slower torch path is used" in caplog.text


@pytest.mark.parametrize("wanted", ["auto", "amx", "avx512", "avx2", "none"])
def test_the_settings_choose_among_what_the_machine_has(
    cache: Path, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DSPARK_CPU_OPERATORS", raising=False)
    best = library.instruction_set()
    monkeypatch.setenv("DSPARK_CPU_OPERATORS", wanted)
    chosen = library.instruction_set()
    assert chosen in ({"auto": {best}, "none": {None}}.get(wanted) or {wanted, None})
    assert (library.load() is not None) == (chosen is not None and shutil.which("c++") is not None)


def test_a_setting_that_does_not_exist_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSPARK_CPU_OPERATORS", "avx3")
    with pytest.raises(ConfigError, match="avx3"):
        library.load()
