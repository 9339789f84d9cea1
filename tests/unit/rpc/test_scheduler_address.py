"""The search for the scheduler, while Serve's controller does not answer."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from ray import serve

from dspark.rpc.scheduler_address import scheduler_of


class Handle:
    """A deployment's, as far as it is used."""

    @property
    def grpc_address(self) -> Handle:
        return self

    async def remote(self) -> str:
        return "host:1"


async def test_searches_that_are_given_up_hold_one_thread_in_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    began, answers = threading.Event(), threading.Event()

    def get(name: str, app_name: str) -> Any:  # Serve's controller cannot be made to hang
        asked.append(app_name)
        began.set()
        assert answers.wait(30)
        return Handle()

    monkeypatch.setattr(serve, "get_deployment_handle", get)
    locate = scheduler_of("here")
    for _ in range(5):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await locate()
    assert await asyncio.to_thread(began.wait, 10)
    assert asked == ["here"]
    answers.set()
    assert await locate() == "host:1"
    assert await locate() == "host:1"
    assert asked == ["here", "here"]  # anew, since another application may be there by now


async def test_a_search_that_failed_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[Any] = [ValueError("no such application"), Handle()]

    def get(name: str, app_name: str) -> Any:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(serve, "get_deployment_handle", get)
    locate = scheduler_of("here")
    with pytest.raises(ValueError, match="no such"):
        await locate()
    assert await locate() == "host:1"
