"""Where the scheduler listens, by asking its Serve application; inside a Ray cluster only."""

from __future__ import annotations

import asyncio

from ray import serve

from dspark.applications import SCHEDULER
from dspark.rpc.lease import Locate


def scheduler_of(application: str) -> Locate:
    """Finds host:port of the scheduler that leads, as one of `application`'s replicas knows it.

    Asked anew at each call: applications come up in any order, and one that was deployed anew
    has other replicas. Raises what Ray may while there is none.
    """

    async def locate() -> str:
        # The first time it asks Serve's controller whether there is one, and waits for that.
        handle = await asyncio.to_thread(
            serve.get_deployment_handle, SCHEDULER.name, app_name=application
        )
        address: str = await handle.grpc_address.remote()
        return address

    return locate
