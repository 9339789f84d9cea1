"""What a caller asks for, whichever protocol it came by, and the defaults of what it left out."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, fields, replace
from typing import Any

from dspark.errors import InvalidRequestError
from dspark.types import SamplingParams, VerifyMode

ROLES = ("system", "developer", "user", "assistant")
MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 256
_MAX_UINT32 = 2**32 - 1  # what the wire takes


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class SamplingWish:
    """What was said about sampling; None was left out and takes SamplingParams' default."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    mode: VerifyMode | None = None
    speculate: bool | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt and how to go on from it. Raises InvalidRequestError."""

    model: str
    prompt: tuple[Turn, ...] | str
    prompt_field: str  # what the protocol calls it, for errors
    wish: SamplingWish = SamplingWish()
    stop: tuple[str, ...] = ()
    service_class: str = ""  # empty: the default
    class_field: str = "service_class"  # what the protocol calls it, for errors
    max_tokens_field: str = "max_tokens"  # likewise

    def __post_init__(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                f"stop takes at most {MAX_STOP_STRINGS} strings; got {len(self.stop)}", param="stop"
            )
        for stop in self.stop:
            require_unicode(stop, "stop")
            if not 0 < len(stop) <= MAX_STOP_CHARS:
                raise InvalidRequestError(
                    f"a stop string needs 1 to {MAX_STOP_CHARS} characters; got {len(stop)}",
                    param="stop",
                )


def sampling_of(wish: SamplingWish) -> SamplingParams:
    """The wish with its defaults; the seed is drawn. Raises InvalidRequestError."""
    said: dict[str, Any] = {
        field.name: value
        for field in fields(wish)
        if (value := getattr(wish, field.name)) is not None
    }
    said.setdefault("seed", secrets.randbits(62))
    sampling = SamplingParams(**said)
    if sampling.top_k > _MAX_UINT32:
        raise InvalidRequestError(
            f"top_k must be at most {_MAX_UINT32}; got {sampling.top_k}: use 0 to turn it off",
            param="top_k",
        )
    return sampling


def fit(
    sampling: SamplingParams, asked: GenerationRequest, prompt_tokens: int, context_tokens: int
) -> SamplingParams:
    """max_tokens within the context: the default is cut to what is left, a wish is refused."""
    room = context_tokens - prompt_tokens
    wished, field = asked.wish.max_tokens, asked.max_tokens_field
    if wished is None:
        return replace(sampling, max_tokens=min(sampling.max_tokens, room))
    if wished > room:
        raise InvalidRequestError(
            f"{field} {wished} and a prompt of {prompt_tokens} tokens exceed the context of "
            f"{context_tokens}: ask for at most {room}, or leave {field} out",
            param=field,
        )
    return sampling


def require_unicode(text: str, field: str) -> None:
    """InvalidRequestError if `text` has half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{field} is not valid Unicode: a lone surrogate U+{ord(text[error.start]):04X} at "
            f"character {error.start}; send whole characters",
            param=field,
        ) from error
