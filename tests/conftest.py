"""For all tests: few threads, since tiny models gain nothing from more; fixed examples."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported, by whomever
torch.set_num_threads(1)
settings.register_profile("dspark", derandomize=True, deadline=None)
settings.load_profile("dspark")


# They run services, Ray and stores beside each other and wait for events: one after the other.
_OF_PROCESSES = ("e2e", "services", "unit/training/test_job.py")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With pytest-xdist, whose workers share out groups: a group each file, the above one."""
    tests = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(tests).as_posix()
        group = "processes" if path.startswith(_OF_PROCESSES) else path
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session", autouse=True)
def step_times_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tiny models' step times are none for the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspark.engine.step_times.cache_folder", lambda: folder)
        yield
