"""Prompts to token ids: the target's chat template, its tokenizer, and the limits."""

from __future__ import annotations

import asyncio
from typing import Any

from jinja2 import TemplateError

from dspark.errors import InvalidRequestError
from dspark.services.gateway.request import ROLES, Turn, require_unicode

# Tokenising releases the GIL; below this many characters it is done before a thread would start.
_INLINE_CHARS = 2_000


class PromptEncoder:
    """Encodes prompts of one model. Raises InvalidRequestError naming the field."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    async def encode(
        self, prompt: tuple[Turn, ...] | str, field: str, context_tokens: int
    ) -> tuple[int, ...]:
        """Token ids of a prompt that leaves room for at least one more token."""
        chars = len(prompt) if isinstance(prompt, str) else sum(len(t.content) for t in prompt)
        if chars <= _INLINE_CHARS:
            token_ids = self._encode(prompt, field)
        else:
            token_ids = await asyncio.to_thread(self._encode, prompt, field)
        if not token_ids:
            raise InvalidRequestError(
                f"{field} is empty: there is nothing to continue", param=field
            )
        if len(token_ids) >= context_tokens:
            raise InvalidRequestError(
                f"{field} has {len(token_ids)} tokens and the context takes {context_tokens}, "
                f"answer included: shorten it to at most {context_tokens - 1}",
                param=field,
            )
        return token_ids

    def _encode(self, prompt: tuple[Turn, ...] | str, field: str) -> tuple[int, ...]:
        if isinstance(prompt, str):
            require_unicode(prompt, field)
            return tuple(self._tokenizer(prompt)["input_ids"])
        # The template writes the special tokens itself.
        text = self._render(prompt, field)
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, turns: tuple[Turn, ...], field: str) -> str:
        if not turns:
            raise InvalidRequestError(
                f"{field} is empty: a conversation needs at least one turn", param=field
            )
        for i, turn in enumerate(turns):
            if turn.role not in ROLES:
                raise InvalidRequestError(
                    f"{field}[{i}].role must be one of {', '.join(ROLES)}; got {turn.role!r}",
                    param=f"{field}[{i}].role",
                )
            require_unicode(turn.content, f"{field}[{i}].content")
        if self._tokenizer.chat_template is None:
            raise InvalidRequestError(
                "this model has no chat template: send plain text to continue "
                "(`prompt` of /v1/completions, `text` of Generate)",
                param=field,
            )
        # OpenAI's newer name of the system, which few templates know.
        known = "developer" in self._tokenizer.get_chat_template()
        roles = {} if known else {"developer": "system"}
        try:
            text: str = self._tokenizer.apply_chat_template(
                [{"role": roles.get(t.role, t.role), "content": t.content} for t in turns],
                tokenize=False,
                add_generation_prompt=True,
            )
        except TemplateError as error:  # templates refuse, say, two user turns in a row
            raise InvalidRequestError(
                f"the model's chat template refuses {field}: {error}", param=field
            ) from error
        return text
