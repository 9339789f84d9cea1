"""For all tests: few threads, since tiny models gain nothing from more; fixed examples."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before gRPC begins: with it, one in fifty processes dies that Ray forks while a call is under way.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported, by whomever
torch.set_num_threads(1)
settings.register_profile("dspark", derandomize=True, deadline=None)
settings.load_profile("dspark")


# Files that go to one worker of pytest-xdist. The first take longest by far, so they begin first.
_TOGETHER = {
    # They run Ray, services and stores beside each other and wait for events: one after the other.
    "e2e": ("e2e",),
    "services": ("services",),
    # They look at the same renderings of the chart, each of which is made once in a process.
    "renderings": tuple(
        f"chart/test_{n}.py" for n in ("objects", "policies", "security", "serve_config")
    ),
}


def _scope(nodeid: str) -> str:
    path = nodeid.partition("::")[0].removeprefix("tests/")
    return next((name for name, files in _TOGETHER.items() if path.startswith(files)), path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(_TOGETHER)}
    items.sort(key=lambda item: order.get(_scope(item.nodeid), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With pytest-xdist, whole files go to its workers, in the order of their collection."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]  # xdist is untyped
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def step_times_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tiny models' step times are none for the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspark.engine.step_times.cache_folder", lambda: folder)
        yield
