"""When replicas come and go (docs/autoscaling.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dspark.config.checks import between
from dspark.errors import ConfigError


@dataclass(frozen=True, slots=True)
class VerifierScaling:
    """When verifiers come and go (docs/autoscaling.md)."""

    policy: str = "pressure"  # pressure | forecast | module:Class, a policy of Ray Serve
    min_replicas: int = 1
    max_replicas: int = 4
    kv_pressure: float = 0.7  # share of its KV pages that a replica should have in use
    queue_age_s: float = 2.0  # no request should wait for longer
    floor_attainment: float = 0.95  # share of requests with a floor that should be above it
    up_after_s: float = 10.0  # more replicas are needed for so long before they come
    down_after_s: float = 300.0  # and fewer, before they go
    deadband: float = 0.1  # of their number; a need that is no further from it changes nothing
    lead_s: float = 900.0  # policy forecast: how far ahead it looks

    def __post_init__(self) -> None:
        _check_scaling(self, 1, "pressure", "forecast")
        between(self, 0.01, 1.0, "kv_pressure")
        between(self, 0.01, 0.99, "floor_attainment")  # all, and none could ever go
        between(self, 0.01, math.inf, "queue_age_s")
        between(self, 0.0, 43200.0, "lead_s")


@dataclass(frozen=True, slots=True)
class DraftScaling:
    """When draft replicas come and go (docs/autoscaling.md)."""

    policy: str = "demand"  # demand | module:Class, a policy of Ray Serve
    min_replicas: int = 0
    max_replicas: int = 4
    min_ratio: float = 0.25  # draft replicas to a verifier, while any are wanted
    max_ratio: float = 1.0
    busy: float = 0.6  # share of the time that a replica should be drafting
    missed: float = 0.05  # share of blocks that may miss their deadline
    wanted: float = 0.25  # a verifier that wants blocks in this share of its rounds wants drafts
    wake_after_s: float = 5.0  # drafts are wanted for so long before the first comes
    zero_after_s: float = 300.0  # and by nobody, before the last goes
    retry_after_s: float = 3600.0  # with traffic and no drafts for so long, look again; 0: never
    up_after_s: float = 10.0
    down_after_s: float = 300.0
    deadband: float = 0.1

    def __post_init__(self) -> None:
        _check_scaling(self, 0, "demand")
        between(self, 0.01, 1.0, "busy", "missed", "wanted")
        between(self, 0.0, math.inf, "min_ratio", "wake_after_s", "zero_after_s", "retry_after_s")
        between(self, max(self.min_ratio, 0.01), math.inf, "max_ratio")


@dataclass(frozen=True, slots=True)
class AutoscalingConfig:
    """Replicas by load; off, there are as many as ServeConfig says."""

    enabled: bool = False
    interval_s: float = 5.0  # between reports; policies see means over the last four
    stale_after_s: float = 30.0  # an older report is none, and nothing shrinks without reports
    verifier: VerifierScaling = field(default_factory=VerifierScaling)
    draft: DraftScaling = field(default_factory=DraftScaling)

    def __post_init__(self) -> None:
        between(self, 0.1, math.inf, "interval_s")
        between(self, 2 * self.interval_s, math.inf, "stale_after_s")


def _check_scaling(settings: VerifierScaling | DraftScaling, least: int, *policies: str) -> None:
    if settings.policy not in policies and ":" not in str(settings.policy):
        raise ConfigError(
            f"no autoscaling policy is called {settings.policy!r}: choose {' or '.join(policies)}, "
            "or name a class as module:Class"
        )
    between(settings, least, math.inf, "min_replicas")
    between(settings, max(least, settings.min_replicas), math.inf, "max_replicas")
    for name in ("min_replicas", "max_replicas"):
        if not isinstance(getattr(settings, name), int):
            raise ConfigError(f"{name} must be a whole number; got {getattr(settings, name)!r}")
    between(settings, 0.0, math.inf, "up_after_s", "down_after_s")
    between(settings, 0.0, 1.0, "deadband")
