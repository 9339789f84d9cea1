"""The plan that a verifier follows: the scheduler's latest while it is valid, then its own."""

from __future__ import annotations

import math
import time

from dspark.config import EngineConfig
from dspark.types import StepPlan, VerificationPolicy


class PlanInForce:
    """One verifier's."""

    def __init__(self, config: EngineConfig) -> None:
        self._own = _plan_of(config)
        self._plan, self._until = self._own, math.inf

    def reconfigure(self, config: EngineConfig) -> None:
        """Follow `config` where no plan is valid; one that is stays in force."""
        follows_own = self._plan is self._own
        self._own = _plan_of(config)
        if follows_own:
            self._plan = self._own

    def follow(self, plan: StepPlan) -> None:
        """Follow `plan` until its validity ends, then the configuration again."""
        self._plan, self._until = plan, time.monotonic() + plan.valid_for_s

    @property
    def now(self) -> StepPlan:
        """The one that holds."""
        if time.monotonic() > self._until:
            self._plan, self._until = self._own, math.inf
        return self._plan


def _plan_of(config: EngineConfig) -> StepPlan:
    return StepPlan(
        policy=VerificationPolicy(config.policy), draft_by_request=config.draft_by_request
    )
