"""For all tests: few threads, since tiny models gain nothing from more; fixed examples."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported, by whomever
torch.set_num_threads(1)
settings.register_profile("dspark", derandomize=True, deadline=None)
settings.load_profile("dspark")


@pytest.fixture(scope="session", autouse=True)
def step_times_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tiny models' step times are none for the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspark.engine.step_times.cache_folder", lambda: folder)
        yield
