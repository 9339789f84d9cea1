"""From a verifier's reports to the plan pushed to it. Pure.

In this first form a plan says which policy and block length hold, and for how long: Algorithm 1
runs in the verifier, on the blocks at hand. A plan may use reports of finished steps only; anything
else would let a drafted token decide whether it is verified (paper, Appendix A).
"""

from __future__ import annotations

from dspark.config import EngineConfig
from dspark.types import StepPlan, VerificationPolicy

VALID_FOR_S = 10.0
RENEW_AFTER_S = VALID_FOR_S / 3  # two pushes may be lost before a plan lapses


def plan_for(engine: EngineConfig, epoch: int, max_blocks: int = 0) -> StepPlan:
    """The plan that the configuration asks for, within a quota of blocks a round; 0: no bound."""
    return StepPlan(
        epoch=epoch,
        policy=VerificationPolicy(engine.policy),
        block_size=engine.block_size,
        draft_by_request=engine.draft_by_request,
        valid_for_s=VALID_FOR_S,
        max_blocks=max_blocks,
    )
