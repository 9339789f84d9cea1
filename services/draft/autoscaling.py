"""The draft replicas' autoscaling policy, as Ray Serve calls it: read, hear of verifiers, decide.

Serve runs it in its controller, ten times a second, and pickles this module by value: what it
imports must be installed there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark.config import DraftScaling, build
from dspark.scheduling.autoscaling import board
from dspark.scheduling.autoscaling.policies import DraftPolicy, Pool
from dspark.scheduling.autoscaling.signals import DraftSignals, read


class DraftAutoscaling:
    """`policy_function` of the draft deployment; `settings` are those of DraftScaling.

    ConfigError if they are not.
    """

    def __init__(self, model: str, stale_after_s: float, settings: Mapping[str, Any]) -> None:
        self._model, self._stale_after_s = model, stale_after_s
        self._policy = DraftPolicy(build(DraftScaling, settings), stale_after_s)

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Replicas from now on, and the state for the next call."""
        now = ctx.current_time
        readings = read(
            DraftSignals,
            ctx.raw_metrics or {},
            ctx.running_replicas,
            now,
            self._stale_after_s,
        )
        pool = Pool(
            ctx.target_num_replicas,
            ctx.capacity_adjusted_min_replicas,
            ctx.capacity_adjusted_max_replicas,
        )
        verifiers = board.latest(self._model)
        decision = self._policy.decide(now, pool, readings, verifiers, ctx.policy_state)
        return decision.replicas, decision.state
