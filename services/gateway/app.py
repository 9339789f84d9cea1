"""The gateway as a Ray Serve deployment.

As with the verifier's, only a replica imports the service, and with it transformers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray import serve

from dspark.applications import GATEWAY, Reconfiguring
from dspark.config import ServeConfig
from dspark.rpc.scheduler_address import scheduler_of

if TYPE_CHECKING:
    from fastapi import FastAPI

    from dspark.services.gateway.service import GatewayService

_DRAIN_S = 20.0
# Serve must not count requests before we do: the answer to too many is our 429, and how many that
# is may change while we serve.
_UNCOUNTED = 1_000_000


@serve.deployment(
    name=GATEWAY.name,
    user_config={},  # so that one that is taken away again is noticed
    max_ongoing_requests=_UNCOUNTED,
    max_replicas_per_node=1,  # the port of its gRPC server is fixed
    ray_actor_options={"num_cpus": 0},
    health_check_period_s=2,
    health_check_timeout_s=5,
    graceful_shutdown_timeout_s=_DRAIN_S + 10,
)
@serve.ingress()  # the app is built per replica, below
class Gateway:
    """HTTP through Serve's proxy, gRPC on a server of its own."""

    # Serve awaits it; the servers that start here live on the loop that serves requests.
    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]
        from dspark.models.tokenizer import load_tokenizer
        from dspark.services.gateway.service import GatewayService

        self._config, self._reconfiguring = config, Reconfiguring()
        tokenizer: Any = await asyncio.to_thread(load_tokenizer, config.model.target)
        locate = scheduler_of(config.scheduler.application)
        self._service = GatewayService(config, tokenizer, locate)
        await self._service.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._service.http_app()

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Go on by what `user_config` changes."""
        with self._reconfiguring.taking():
            self._service.reconfigure(GATEWAY.changed(self._config, user_config))

    async def check_health(self) -> None:
        """Raises when Serve should replace this replica."""
        await self._service.check()

    async def __del__(self) -> None:  # Serve awaits it, once HTTP requests are through
        service: GatewayService | None = getattr(self, "_service", None)
        if service is not None:  # else the constructor failed
            await service.stop(_DRAIN_S)


def deployment(config: ServeConfig) -> Any:
    """The bound deployment."""
    gateway: Any = Gateway  # Serve's decorators are untyped
    return gateway.options(num_replicas=config.gateway_replicas).bind(config)


def build(args: dict[str, Any]) -> Any:
    """The Serve application of a config file; RayServeException if `args` are not its settings."""
    return deployment(GATEWAY.deployed(args))
