"""The verifier as a Ray Serve deployment.

The service brings torch, which takes seconds to import, so only a replica does: this module is also
what Serve builds the application from, in a process of its own, and what `dspark serve` deploys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from dspark.applications import VERIFIER, Reconfiguring, keep_loaded
from dspark.config import ServeConfig
from dspark.rpc.reserved import with_threads
from dspark.rpc.scheduler_address import scheduler_of
from dspark.scheduling.autoscaling.options import verifier_options
from dspark.scheduling.autoscaling.signals import to_stats

if TYPE_CHECKING:
    from dspark.services.verifier.service import VerifierService

_DRAIN_S = 30.0


@serve.deployment(
    name=VERIFIER.name,
    user_config={},  # so that one that is taken away again is noticed
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=_DRAIN_S + 5,
    ray_actor_options={"num_cpus": 0},
)
class VerifierReplica:
    """Loads the target, then serves and beats until it is stopped."""

    # Serve awaits it; what starts here lives on the replica's event loop.
    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]
        from dspark.services.verifier.service import VerifierService

        self._config, self._reconfiguring = config, Reconfiguring()
        settings = replace(config, model=with_threads(config.model))
        service = VerifierService(settings, scheduler_of(config.scheduler.application))
        await service.start(ray.util.get_node_ip_address())
        keep_loaded()
        self._service = service

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Go on by what `user_config` changes."""
        with self._reconfiguring.taking():
            await self._service.reconfigure(VERIFIER.changed(self._config, user_config).engine)

    async def address(self) -> str:
        """host:port of this replica's gRPC server; for operators."""
        return self._service.address

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray Serve asks every so often, and hands it to the autoscaling policy."""
        return to_stats(self._service.signals())

    async def check_health(self) -> None:
        """Raises when Serve should replace this replica."""
        await self._service.check()

    async def __del__(self) -> None:
        """Drain and stop."""
        service: VerifierService | None = getattr(self, "_service", None)
        if service is not None:  # else the constructor failed
            await service.stop(_DRAIN_S)


def deployment(config: ServeConfig) -> Any:
    """The bound deployment."""
    replica: Any = VerifierReplica  # Serve's decorators are untyped
    return replica.options(**verifier_options(config)).bind(config)


def build(args: dict[str, Any]) -> Any:
    """The Serve application of a config file; RayServeException if `args` are not its settings."""
    return deployment(VERIFIER.deployed(args))
