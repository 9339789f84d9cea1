"""An engine with its lease and its plans, which runs when told to and rests in between."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass

from dspark.engine.runner import EngineRunner
from dspark.engine.verifier import VerifierEngine
from dspark.pb import scheduler_pb2 as pb
from dspark.rpc.lease import LeaseKeeper
from dspark.services.verifier.coordination import Coordinator, load_to_pb
from dspark.types import StepPlan, VerificationResult

_BOUND_S = 60.0
_HEARTBEAT_S = 0.1
WEIGHTS = "w"


@dataclass(frozen=True, slots=True)
class Part:
    """What a step did for a stream, and by whose plan."""

    leader: int  # its fencing token; 0: the verifier's own settings
    max_blocks: int
    result: VerificationResult


class CoordinatedVerifier:
    """It registers as "v"."""

    def __init__(self, engine: VerifierEngine, locate: Callable[[], str]) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self.parts: list[Part] = []
        self.plans: dict[int, StepPlan] = {}  # followed, by epoch
        self._heard, self._rests = asyncio.Event(), asyncio.Event()
        self._goes = threading.Event()
        self._goal: Callable[[], bool] = lambda: True

        async def found() -> str:
            return locate()

        self.lease = LeaseKeeper(
            pb.Replica(
                role=pb.ROLE_VERIFIER,
                incarnation="v",
                address="v:1",
                model="m",
                drafter_fingerprint=WEIGHTS,
                max_context_tokens=512,
            ),
            found,
            lambda: load_to_pb(self.runner),
            lambda beat: None,
            _HEARTBEAT_S,
        )
        self.coordinator = Coordinator(
            "v",
            lambda: self.lease.channel,
            self._follow,
            lambda table: self.runner.set_calibration(table),
        )
        self.runner = EngineRunner(
            engine,
            on_results=self._take,
            on_refused=lambda refusals: None,
            on_report=self.coordinator.report,
            on_failure=lambda error: self._loop.call_soon_threadsafe(self._rests.set),
        )

    async def stop(self) -> None:
        await self.coordinator.stop()
        await self.lease.stop()
        self._goal = lambda: False
        self._goes.set()
        await asyncio.to_thread(self.runner.stop)

    def start(self) -> None:
        self.lease.start()
        self.coordinator.start()
        self.runner.start()

    def of(self, leader: int) -> list[Part]:
        return [part for part in self.parts if part.leader == leader]

    async def runs_until(self, goal: Callable[[], bool]) -> None:
        """Its streams go on until a step after which that is so."""
        self._rests.clear()
        self._goal = goal
        self._goes.set()
        async with asyncio.timeout(_BOUND_S):
            while not goal():
                assert self.runner.failure is None
                await self._rests.wait()
                self._rests.clear()

    async def hears(self, of: Callable[[StepPlan], bool]) -> StepPlan:
        """The first plan of that kind."""
        async with asyncio.timeout(_BOUND_S):
            while not (found := [plan for plan in self.plans.values() if of(plan)]):
                self._heard.clear()
                await self._heard.wait()
        return found[0]

    def _follow(self, plan: StepPlan) -> None:
        self.plans[plan.epoch] = plan
        self.runner.set_plan(plan)
        self._heard.set()

    def _take(self, results: list[VerificationResult]) -> None:
        """On the engine's thread."""
        (step,) = self._engine.explain(1)
        plan = self.plans.get(step.plan_epoch, StepPlan())
        self.parts += [Part(plan.epoch >> 32, plan.max_blocks, result) for result in results]
        if self._goal():
            self._goes.clear()
            self._loop.call_soon_threadsafe(self._rests.set)
            self._goes.wait()
