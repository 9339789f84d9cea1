"""The public contract dspark.v1.Inference, over the generator."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from dspark.errors import DSparkError, InvalidRequestError
from dspark.pb import common_pb2
from dspark.pb import inference_pb2 as pb
from dspark.rpc.status import abort
from dspark.services.gateway.generation import Generator, Part
from dspark.services.gateway.request import GenerationRequest, SamplingWish, Turn
from dspark.wire.requests import finish_to_pb, verify_mode

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"]


class InferenceServicer:
    """Decodes, generates, encodes."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve this contract on `server`.

        Not the generated function: a message that cannot be parsed would end with UNKNOWN.
        """
        handlers = {
            "Generate": grpc.unary_stream_rpc_method_handler(
                self.generate,
                request_deserializer=_parse_generate,
                response_serializer=pb.GenerateResponse.SerializeToString,
            ),
            "ListModels": grpc.unary_unary_rpc_method_handler(
                self.list_models,
                request_deserializer=pb.ListModelsRequest.FromString,
                response_serializer=pb.ListModelsResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),)
        )

    async def generate(
        self, message: pb.GenerateRequest | None, context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Stream the answer; a cancelled call closes the generation with it."""
        try:
            async with aclosing(self._generator.generate(_request(message))) as parts:
                async for part in parts:
                    yield _response(part)
        except DSparkError as error:
            await abort(context, error)
        except Exception:
            log.exception("a generation failed unexpectedly")
            await context.abort(
                grpc.StatusCode.INTERNAL, "the gateway failed; its log says why: report this"
            )

    async def list_models(
        self, message: pb.ListModelsRequest, context: Any
    ) -> pb.ListModelsResponse:
        """The one model of this gateway."""
        context_tokens = self._generator.cluster.context_tokens
        return pb.ListModelsResponse(
            models=[pb.Model(id=self._generator.model, max_context_tokens=context_tokens)]
        )


def _parse_generate(data: bytes) -> pb.GenerateRequest | None:
    try:
        return pb.GenerateRequest.FromString(data)
    except DecodeError:
        return None


def _request(message: pb.GenerateRequest | None) -> GenerationRequest:
    if message is None:
        raise InvalidRequestError(
            "the message is not a dspark.v1.GenerateRequest: check that strings are valid UTF-8 "
            "and that the client was generated from this version's protos"
        )
    match message.WhichOneof("input"):
        case "chat":
            turns = tuple(Turn(m.role, m.content) for m in message.chat.messages)
            prompt: tuple[Turn, ...] | str = turns
            field = "chat.messages"
        case "text":
            prompt, field = message.text, "text"
        case _:
            raise InvalidRequestError("a prompt is missing: set chat or text", param="input")

    def said(name: str) -> Any:
        return getattr(message, name) if message.HasField(name) else None

    wish = SamplingWish(
        max_tokens=said("max_tokens"),
        temperature=said("temperature"),
        top_p=said("top_p"),
        top_k=said("top_k"),
        seed=said("seed"),
        mode=verify_mode(message.mode),
        speculate=said("speculate"),
    )
    return GenerationRequest(
        message.model, prompt, field, wish, tuple(message.stop), message.service_class
    )


def _response(part: Part) -> pb.GenerateResponse:
    message = pb.GenerateResponse(
        id=part.id,
        text=part.text,
        spans=[pb.TextSpan(text=span.text, drafted=span.drafted) for span in part.spans],
        token_ids=part.token_ids,
    )
    if part.finish is not None:
        stats = part.finish.speculation
        message.finish_reason = finish_to_pb(part.finish.reason)
        message.usage.prompt_tokens = part.finish.prompt_tokens
        message.usage.completion_tokens = part.finish.completion_tokens
        message.speculation.CopyFrom(
            common_pb2.SpeculationStats(
                steps=stats.steps,
                drafted_tokens=stats.drafted_tokens,
                verified_tokens=stats.verified_tokens,
                accepted_tokens=stats.accepted_tokens,
                verified_by_position=stats.verified_by_position,
                accepted_by_position=stats.accepted_by_position,
            )
        )
    return message
