"""A blocking client of the public contract, for the command line and scripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import grpc

from dspark.errors import ConfigError, DSparkError, UnauthenticatedError
from dspark.pb import inference_pb2 as pb
from dspark.pb import inference_pb2_grpc
from dspark.rpc.options import channel_options
from dspark.rpc.status import from_rpc_error

PUBLIC_AUTHORITIES = "public"


@dataclass(frozen=True, slots=True)
class GatewayTls:
    """How a client speaks TLS to a gateway; all are files of PEM."""

    ca_file: str  # who issued the gateway's certificate; PUBLIC_AUTHORITIES: those that gRPC knows
    cert_file: str = ""  # the client's own, where the gateway asks for one
    key_file: str = ""
    name: str = ""  # in the gateway's certificate; empty: the host that is dialled

    def channel(self, address: str) -> grpc.Channel:
        """A channel to host:port; ConfigError if a file cannot be read."""
        if bool(self.cert_file) != bool(self.key_file):
            raise ConfigError(
                "a client's certificate and its key go together: give both or neither"
            )
        credentials = grpc.ssl_channel_credentials(
            None if self.ca_file == PUBLIC_AUTHORITIES else _pem(self.ca_file),
            _pem(self.key_file) if self.key_file else None,
            _pem(self.cert_file) if self.cert_file else None,
        )
        options: list[tuple[str, int | str]] = [*channel_options()]
        if self.name:
            options.append(("grpc.ssl_target_name_override", self.name))
        return grpc.secure_channel(address, credentials, options=options)


class InferenceClient:
    """Streams answers from a gateway. Raises the errors that the server means (dspark.errors)."""

    def __init__(self, address: str, tls: GatewayTls | None = None, api_key: str = "") -> None:
        if not api_key.isascii() or not api_key.isprintable():
            raise ConfigError(
                "the API key holds characters that no key has: look how it was copied"
            )
        self._channel = (
            grpc.insecure_channel(address, options=channel_options())
            if tls is None
            else tls.channel(address)
        )
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else None
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
            answer = self._stub.ListModels(
                pb.ListModelsRequest(), timeout=timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise _meaning(error) from error
        return list(answer.models)

    def generate(
        self, request: pb.GenerateRequest, timeout_s: float = 600.0
    ) -> Iterator[pb.GenerateResponse]:
        """The parts of an answer."""
        try:
            yield from self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
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
    # Not in from_rpc_error: between services it would become the fault of whoever asked us.
    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
        return UnauthenticatedError(error.details())
    return from_rpc_error(error)


def _pem(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
