"""What clients of the OpenAI API may send. Anything else is refused by name, never ignored.

Of OpenAI's parameters that are not supported, the values that ask for nothing (n 1, penalties 0,
no logprobs, no tools) are accepted, and so are those that cannot change the output, such as `user`.
A null says nothing, in a field that is not known either: clients send back messages with every
field that their library has.
"""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dspark.services.gateway.request import GenerationRequest, SamplingWish, Turn
from dspark.types import VerifyMode


def _only(*neutral: object) -> AfterValidator:
    def check(value: object) -> object:
        for one in neutral:
            if value == one and isinstance(value, bool) == isinstance(one, bool):  # 0 == False
                return value
        supported, got = " or ".join(map(repr, neutral)), reprlib.repr(value)
        raise ValueError(f"only {supported} is supported, got {got}: leave it out")

    return AfterValidator(check)


def _joined_text(value: object) -> object:
    """Of text parts, the lines of one text, as vLLM makes of them."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"must be a string or a list of text parts; got {type(value).__name__}")
    if not value:
        raise ValueError("a list of content parts needs at least one")
    return "\n".join(_text_of(i, part) for i, part in enumerate(value))


def _text_of(i: int, part: object) -> str:
    said = part if isinstance(part, dict) else {}
    kind, text = said.get("type"), said.get("text")
    if isinstance(kind, str) and kind != "text":
        raise ValueError(f"part {i} is of type {reprlib.repr(kind)}; only 'text' is supported")
    more = [name for name, one in said.items() if name not in ("type", "text") and one is not None]
    if kind != "text" or not isinstance(text, str) or more:
        raise ValueError(
            f"part {i} must be {{'type': 'text', 'text': '…'}} and no more; got "
            f"{reprlib.repr(part)}"
        )
    return text


def _single_prompt(value: object) -> object:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"must be a string; got {type(value).__name__}")
    if any(isinstance(item, int | list) for item in value):
        raise ValueError("token ids are not supported: send the prompt as text")
    if len(value) != 1 or not isinstance(value[0], str):
        raise ValueError(f"one prompt a request is supported; got a list of {len(value)}")
    return value[0]


def _stop_list(value: object) -> object:
    if value is None or isinstance(value, str):
        return value if value is None else [value]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ValueError("must be a string or a list of strings")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, said: object) -> object:
        if isinstance(said, dict):
            return {name: value for name, value in said.items() if value is not None}
        return said


class StreamOptions(_Strict):
    """How a stream ends."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[bool | None, _only(False)] = None


class ChatMessage(_Strict):
    """One turn."""

    role: str
    content: Annotated[str, BeforeValidator(_joined_text)]
    # Only the values that say nothing.
    tool_calls: Annotated[Any, _only([])] = None
    annotations: Annotated[Any, _only([])] = None


class _Common(_Strict):
    model: str
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_stop_list)] = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: str | None = None  # one of our service classes; auto: the default
    # Ours, beyond OpenAI's.
    top_k: int | None = None
    verify_mode: Literal["rejection", "coupled"] | None = None
    speculate: bool | None = None
    # Without effect on the output.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    # Only the values that ask for nothing.
    n: Annotated[int | None, _only(1)] = None
    presence_penalty: Annotated[float | None, _only(0)] = None
    frequency_penalty: Annotated[float | None, _only(0)] = None
    logprobs: Annotated[bool | int | None, _only(False)] = None
    logit_bias: Annotated[Any, _only({})] = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def _service_class(self) -> str:
        return "" if self.service_tier is None or self.service_tier == "auto" else self.service_tier

    def _wish(self, max_tokens: int | None) -> SamplingWish:
        return SamplingWish(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            mode=None if self.verify_mode is None else VerifyMode(self.verify_mode),
            speculate=self.speculate,
        )


class ChatCompletionRequest(_Common):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    # OpenAI's newer name of max_tokens; it wins. Its bound is told here, by that name.
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    parallel_tool_calls: bool | None = None  # without effect, as there are no tools
    # Only the values that ask for nothing.
    tools: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    functions: Annotated[Any, _only([])] = None
    function_call: Annotated[Any, _only("none", "auto")] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    modalities: Annotated[Any, _only(["text"])] = None
    store: Annotated[Any, _only(False)] = None
    top_logprobs: Annotated[Any, _only(0)] = None

    def generation_request(self) -> GenerationRequest:
        """What it asks for, in our terms."""
        newer = self.max_completion_tokens
        return GenerationRequest(
            model=self.model,
            prompt=tuple(Turn(m.role, m.content) for m in self.messages),
            prompt_field="messages",
            wish=self._wish(self.max_tokens if newer is None else newer),
            max_tokens_field="max_tokens" if newer is None else "max_completion_tokens",
            stop=tuple(self.stop or ()),
            service_class=self._service_class,
            class_field="service_tier",
        )


class CompletionRequest(_Common):
    """POST /v1/completions."""

    prompt: Annotated[str, BeforeValidator(_single_prompt)]
    # Only the values that ask for nothing.
    echo: Annotated[Any, _only(False)] = None
    best_of: Annotated[Any, _only(1)] = None
    suffix: Annotated[Any, _only("")] = None

    def generation_request(self) -> GenerationRequest:
        """What it asks for, in our terms."""
        return GenerationRequest(
            model=self.model,
            prompt=self.prompt,
            prompt_field="prompt",
            wish=self._wish(self.max_tokens),
            stop=tuple(self.stop or ()),
            service_class=self._service_class,
            class_field="service_tier",
        )
