"""Which verifier takes a request: the scheduler's choice, or our own while it is out of reach."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Collection

import grpc

from dspark.errors import ModelNotFoundError, UnavailableError
from dspark.pb import scheduler_pb2 as pb
from dspark.pb import scheduler_pb2_grpc
from dspark.rpc.status import from_rpc_error
from dspark.services.gateway.cluster import ClusterView
from dspark.services.gateway.prefixes import prefixes_of
from dspark.types import Request

log = logging.getLogger(__name__)

_PLACE_TIMEOUT_S = 2.0
_ANSWERED = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.FAILED_PRECONDITION,
    }
)


class Placement:
    """`scheduler` gives the channel to the scheduler, or None while it is away."""

    def __init__(
        self,
        cluster: ClusterView,
        scheduler: Callable[[], grpc.aio.Channel | None],
        prefix_cache: bool = True,  # of the verifiers
    ) -> None:
        self._cluster, self._scheduler = cluster, scheduler
        self._prefix_cache = prefix_cache

    async def place(self, request: Request, model: str, avoid: Collection[str]) -> pb.Replica:
        """A verifier for the request; UnavailableError if there is none at the moment.

        OverloadedError if all are full, and InvalidRequestError, are the scheduler's word.
        """
        channel = self._scheduler()
        if channel is None:
            return self._choose(request, avoid)
        message = pb.PlaceRequest(
            request_id=request.id,
            model=model,
            prompt_tokens=len(request.prompt_token_ids),
            max_tokens=request.sampling.max_tokens,
            avoid_incarnations=avoid,
            prefixes=prefixes_of(model, request.prompt_token_ids) if self._prefix_cache else (),
            let_in=request.epoch > 0,
        )
        stub = scheduler_pb2_grpc.SchedulerStub(channel)
        try:
            answer: pb.PlaceResponse = await stub.Place(message, timeout=_PLACE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() not in _ANSWERED:
                log.warning("placing without the scheduler: %s", error.details())
                return self._choose(request, avoid)
            refusal = from_rpc_error(error)
            if isinstance(refusal, ModelNotFoundError):
                # The gateway has checked the name: its verifiers are not there, yet or any more.
                raise UnavailableError(str(refusal)) from error
            raise refusal from error
        except (asyncio.CancelledError, grpc.aio.UsageError):
            # The lease keeper closes the channel when a beat fails, which looks like this here.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return self._choose(request, avoid)
        return answer.verifier

    def _choose(self, request: Request, avoid: Collection[str]) -> pb.Replica:
        positions = len(request.prompt_token_ids) + request.sampling.max_tokens
        known = self._cluster.verifiers
        fitting = [v for v in known if positions <= (v.max_context_tokens or positions)]
        candidates = [v for v in fitting if v.incarnation not in avoid] or fitting
        if not candidates:
            which = f" that takes {positions} positions" if known else ""
            raise UnavailableError(
                f"no verifier{which} is known, and the scheduler is out of reach"
            )
        return random.choice(candidates)
