"""What the gateway knows of the cluster, and who waits for it."""

from __future__ import annotations

import asyncio

import pytest

from dspark.pb import scheduler_pb2 as pb
from dspark.services.gateway.cluster import ClusterView


@pytest.mark.parametrize("turns", range(4))
async def test_a_caller_who_leaves_as_the_first_verifier_comes_is_let_go(turns: int) -> None:
    view = ClusterView("m")
    waiting = asyncio.create_task(view.wait_known(10))
    await asyncio.sleep(0)  # it waits now
    await asyncio.sleep(0)
    view.heard(pb.HeartbeatResponse(verifiers=[pb.Replica(model="m", max_context_tokens=8)]))
    for _ in range(turns):
        await asyncio.sleep(0)
    if waiting.cancel():
        with pytest.raises(asyncio.CancelledError):
            await waiting
    else:
        assert waiting.result()


@pytest.mark.parametrize(("told", "takes"), [([8, 4], 4), ([8, 0], 8), ([0], 0), ([], 0)])
def test_a_request_may_be_as_long_as_all_take_that_say_so(told: list[int], takes: int) -> None:
    view = ClusterView("m")
    verifiers = [pb.Replica(model="m", max_context_tokens=tokens) for tokens in told]
    view.heard(pb.HeartbeatResponse(verifiers=verifiers))
    assert view.context_tokens == takes
