"""For all tests: few threads, since tiny models gain nothing from more; fixed examples."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported, by whomever
torch.set_num_threads(1)
settings.register_profile("dspark", derandomize=True, deadline=None)
settings.load_profile("dspark")


_TOGETHER = {
    # They run services, Ray and stores beside each other and wait for events: one after the other.
    "processes": ("e2e", "services", "unit/training/test_job.py"),
    # They look at the same renderings of the chart, each of which is made once in a process.
    "renderings": tuple(
        f"chart/test_{n}.py" for n in ("objects", "policies", "security", "serve_config")
    ),
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With pytest-xdist, whole files go to its workers, and those above to one of them each."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]  # xdist is untyped
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0].removeprefix("tests/")
            return next((name for name, files in _TOGETHER.items() if path.startswith(files)), path)

    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def step_times_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tiny models' step times are none for the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspark.engine.step_times.cache_folder", lambda: folder)
        yield
