"""Parts as OpenAI's objects: whole answers, stream chunks, usage and speculation metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dspark.services.gateway.generation import Finish, Part


class Replies(Protocol):
    """The shapes of one endpoint, for one request."""

    def whole(self, parts: Sequence[Part]) -> dict[str, Any]:
        """The answer at once."""

    def opening(self, part: Part) -> list[dict[str, Any]]:
        """Chunks that come before any text."""

    def chunk(self, part: Part, text: str | None, finish_reason: str | None) -> dict[str, Any]:
        """A chunk with text, or one that ends the choice."""

    def usage_chunk(self, part: Part, finish: Finish) -> dict[str, Any]:
        """The chunk behind the last."""


@dataclass(frozen=True, slots=True)
class _Endpoint:
    model: str
    include_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def _head(self, part: Part, prefix: str, kind: str) -> dict[str, Any]:
        return {
            "id": prefix + part.id.removeprefix("gen-"),
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _chunk(self, head: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**head, "choices": [choice]}
        if self.include_usage:
            chunk["usage"] = None  # as OpenAI does: only the last chunk has it
        return chunk


@dataclass(frozen=True, slots=True)
class ChatReplies(_Endpoint):
    """POST /v1/chat/completions."""

    def whole(self, parts: Sequence[Part]) -> dict[str, Any]:
        text, finish = _text(parts), _finish(parts)
        return {
            **self._head(parts[-1], "chatcmpl-", "chat.completion"),
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "logprobs": None,
                    "finish_reason": finish.reason.value,
                }
            ],
            **_totals(finish),
        }

    def opening(self, part: Part) -> list[dict[str, Any]]:
        return [self._delta(part, {"role": "assistant", "content": ""}, None)]

    def chunk(self, part: Part, text: str | None, finish_reason: str | None) -> dict[str, Any]:
        return self._delta(part, {} if text is None else {"content": text}, finish_reason)

    def usage_chunk(self, part: Part, finish: Finish) -> dict[str, Any]:
        head = self._head(part, "chatcmpl-", "chat.completion.chunk")
        return {**head, "choices": [], **_totals(finish)}

    def _delta(
        self, part: Part, delta: dict[str, str], finish_reason: str | None
    ) -> dict[str, Any]:
        head = self._head(part, "chatcmpl-", "chat.completion.chunk")
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._chunk(head, choice)


@dataclass(frozen=True, slots=True)
class CompletionReplies(_Endpoint):
    """POST /v1/completions."""

    def whole(self, parts: Sequence[Part]) -> dict[str, Any]:
        text, finish = _text(parts), _finish(parts)
        choice = _completion_choice(text, finish.reason.value)
        return {**self._completion(parts[-1]), "choices": [choice], **_totals(finish)}

    def opening(self, part: Part) -> list[dict[str, Any]]:
        return []

    def chunk(self, part: Part, text: str | None, finish_reason: str | None) -> dict[str, Any]:
        choice = _completion_choice(text or "", finish_reason)
        return self._chunk(self._completion(part), choice)

    def usage_chunk(self, part: Part, finish: Finish) -> dict[str, Any]:
        return {**self._completion(part), "choices": [], **_totals(finish)}

    def _completion(self, part: Part) -> dict[str, Any]:
        return self._head(part, "cmpl-", "text_completion")


def _completion_choice(text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}


def _text(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts)


def _finish(parts: Sequence[Part]) -> Finish:
    finish = parts[-1].finish
    assert finish is not None, "a generation's last part has a finish"
    return finish


def _totals(finish: Finish) -> dict[str, Any]:
    """Usage, and vLLM's per-request speculation metrics as far as they are known here."""
    stats = finish.speculation
    return {
        "usage": {
            "prompt_tokens": finish.prompt_tokens,
            "completion_tokens": finish.completion_tokens,
            "total_tokens": finish.prompt_tokens + finish.completion_tokens,
        },
        "metrics": {
            "speculative_decoding": {
                "mean_acceptance_length": stats.mean_acceptance_length,
                "draft_acceptance_rate": stats.draft_acceptance_rate,
                "acceptance_histogram": list(stats.acceptance_histogram),
                "num_spec_steps": stats.spec_steps,
                "num_accepted_draft_tokens": stats.accepted_tokens,
                "num_draft_tokens": stats.drafted_tokens,
                # Beyond vLLM's: of the drafted ones, those that the plan let into the forward.
                "num_verified_draft_tokens": stats.verified_tokens,
                "num_steps": stats.steps,
            }
        },
    }
