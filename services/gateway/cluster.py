"""What the gateway last heard of the cluster; it goes on with that when the scheduler is away."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from dspark.pb import scheduler_pb2 as pb


class ClusterView:
    """The verifiers of one model, from heartbeat answers."""

    def __init__(self, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._model, self._clock = model, clock
        self._verifiers: tuple[pb.Replica, ...] = ()
        self._heard_at = -math.inf
        self._known = asyncio.Event()
        self._context_tokens = 0

    def heard(self, answer: pb.HeartbeatResponse) -> None:
        """Take in what the scheduler answered to a heartbeat."""
        self._heard_at = self._clock()
        self._verifiers = tuple(v for v in answer.verifiers if v.model == self._model)
        if self._verifiers:
            # The smallest: what is let in can then be continued on any of them.
            told = [v.max_context_tokens for v in self._verifiers if v.max_context_tokens]
            self._context_tokens = min(told, default=0)
            self._known.set()

    @property
    def verifiers(self) -> tuple[pb.Replica, ...]:
        """Those that were alive when the scheduler last answered."""
        return self._verifiers

    @property
    def silent_s(self) -> float:
        """Since the scheduler last answered; infinite if it never did."""
        return self._clock() - self._heard_at

    @property
    def context_tokens(self) -> int:
        """Positions that a request may take, by the last verifiers heard of; 0: none has told."""
        return self._context_tokens

    @property
    def ever_known(self) -> bool:
        """Whether a verifier was heard of since this process began."""
        return self._known.is_set()

    async def wait_known(self, timeout_s: float) -> bool:
        """Wait for the first verifier to be heard of; whether one was."""
        try:
            # wait_for of Python 3.11 loses a cancellation that comes with the event.
            async with asyncio.timeout(timeout_s):
                await self._known.wait()
        except TimeoutError:
            return False
        return True
