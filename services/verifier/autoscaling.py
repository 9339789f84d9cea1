"""The verifiers' autoscaling policy, as Ray Serve calls it: read, decide, tell the drafts.

Serve runs it in its controller, ten times a second, and pickles this module by value: what it
imports must be installed there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark.config import VerifierScaling, build
from dspark.scheduling.autoscaling import board
from dspark.scheduling.autoscaling.policies import Pool, VerifierPolicy, VerifierView
from dspark.scheduling.autoscaling.signals import VerifierSignals, read


class VerifierAutoscaling:
    """`policy_function` of the verifier deployment; `settings` are those of VerifierScaling.

    ConfigError if they are not.
    """

    def __init__(self, model: str, stale_after_s: float, settings: Mapping[str, Any]) -> None:
        self._model, self._stale_after_s = model, stale_after_s
        self._policy = VerifierPolicy(build(VerifierScaling, settings))

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Replicas from now on, and the state for the next call."""
        now = ctx.current_time
        readings = read(
            VerifierSignals,
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
        decision = self._policy.decide(now, pool, readings, ctx.policy_state)
        board.post(self._model, VerifierView.of(now, decision.replicas, readings))
        return decision.replicas, decision.state
