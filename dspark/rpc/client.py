"""A blocking client of the public contract, for the command line and scripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType

import grpc

from dspark.errors import DSparkError
from dspark.pb import inference_pb2 as pb
from dspark.pb import inference_pb2_grpc
from dspark.rpc.options import channel_options
from dspark.rpc.status import from_rpc_error


class InferenceClient:
    """Streams answers from a gateway. Raises the errors that the server means (dspark.errors)."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=channel_options())
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def __enter__(self) -> InferenceClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()

    def models(self, timeout_s: float = 5.0) -> list[pb.Model]:
        """The models served."""
        try:
            return list(self._stub.ListModels(pb.ListModelsRequest(), timeout=timeout_s).models)
        except grpc.RpcError as error:
            raise _meaning(error) from error

    def generate(
        self, request: pb.GenerateRequest, timeout_s: float = 600.0
    ) -> Iterator[pb.GenerateResponse]:
        """The parts of an answer."""
        try:
            yield from self._stub.Generate(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise _meaning(error) from error


def chat_request(
    model: str, turns: Sequence[tuple[str, str]], **settings: object
) -> pb.GenerateRequest:
    """A request that answers a conversation of (role, content) turns."""
    messages = [pb.ChatMessage(role=role, content=content) for role, content in turns]
    return pb.GenerateRequest(
        model=model,
        chat=pb.ChatPrompt(messages=messages),
        **settings,  # type: ignore[arg-type]
    )


def _meaning(error: grpc.RpcError) -> DSparkError:
    return from_rpc_error(error)
