"""Where the scheduler listens, by asking its Serve application; inside a Ray cluster only."""

from __future__ import annotations

import asyncio

from ray import serve
from ray.serve.handle import DeploymentHandle

from dspark.applications import SCHEDULER
from dspark.rpc.lease import Locate


def scheduler_of(application: str) -> Locate:
    """Finds host:port of the scheduler that leads, as one of `application`'s replicas knows it.

    Asked anew at each call: applications come up in any order, and one that was deployed anew
    has other replicas. Raises what Ray may while there is none.
    """

    looking: asyncio.Task[DeploymentHandle] | None = None

    async def locate() -> str:
        nonlocal looking
        # A look-up asks Serve's controller, and blocks while that is away. Who gives it up leaves
        # it its thread; so the next one waits for the same, or soon no thread would be left.
        if looking is None or looking.done():
            looking = asyncio.create_task(
                asyncio.to_thread(serve.get_deployment_handle, SCHEDULER.name, app_name=application)
            )
        handle = await asyncio.shield(looking)
        address: str = await handle.grpc_address.remote()
        return address

    return locate
