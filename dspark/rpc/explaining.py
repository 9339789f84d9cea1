"""A blocking client for operators: which verifiers there are, and why their steps did what."""

from __future__ import annotations

import grpc

from dspark.errors import InvalidRequestError, UnavailableError
from dspark.pb import scheduler_pb2, scheduler_pb2_grpc, verifier_pb2, verifier_pb2_grpc
from dspark.rpc.status import from_rpc_error
from dspark.rpc.transport import PLAINTEXT, Transport
from dspark.scheduling.explanation import StepExplanation
from dspark.wire.explanation import steps_from_pb

_PATIENCE_S = 5.0


def describe(
    scheduler: str, transport: Transport = PLAINTEXT
) -> scheduler_pb2.DescribeClusterResponse:
    """The cluster as the scheduler at host:port sees it; UnavailableError if none answers."""
    with transport.blocking_channel(scheduler) as channel:
        try:
            answer: scheduler_pb2.DescribeClusterResponse = scheduler_pb2_grpc.SchedulerStub(
                channel
            ).DescribeCluster(scheduler_pb2.DescribeClusterRequest(), timeout=_PATIENCE_S)
        except grpc.RpcError as error:
            raise UnavailableError(
                f"no scheduler answers at {scheduler} ({from_rpc_error(error)}): give --scheduler "
                "the host:port that `dspark serve` and the scheduler's log name"
            ) from error
    return answer


def verifiers_of(
    cluster: scheduler_pb2.DescribeClusterResponse, incarnation: str = ""
) -> list[scheduler_pb2.Replica]:
    """Its verifiers, or the one of that name.

    Raises UnavailableError if there are none, InvalidRequestError if that one is not there.
    """
    found = [
        status.replica
        for status in cluster.replicas
        if status.replica.role == scheduler_pb2.ROLE_VERIFIER
    ]
    if not found:
        raise UnavailableError("the scheduler knows no verifier at the moment; try again shortly")
    if not incarnation:
        return found
    named = [replica for replica in found if replica.incarnation == incarnation]
    if not named:
        names = ", ".join(replica.incarnation for replica in found)
        raise InvalidRequestError(
            f"there is no verifier {incarnation!r}; there are: {names}", param="verifier"
        )
    return named


def explain_steps(
    verifier: str, count: int, transport: Transport = PLAINTEXT
) -> list[StepExplanation]:
    """The last steps, up to `count`, of the verifier at host:port, the latest last.

    Raises UnavailableError, InvalidRequestError, and ProtocolError for an answer out of bounds.
    """
    with transport.blocking_channel(verifier) as channel:
        try:
            answer = verifier_pb2_grpc.VerifierStub(channel).ExplainSteps(
                verifier_pb2.ExplainStepsRequest(count=count), timeout=_PATIENCE_S
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
    return steps_from_pb(answer)
