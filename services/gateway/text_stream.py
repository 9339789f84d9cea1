"""From verification results to text by who wrote it, ended by stop strings.

The text of a stop string is never returned, wherever its tokens and blocks begin and end; text that
could still become one is held back. Of several, the one that is complete first ends the text, so
the outcome does not depend on how the tokens were cut into steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from dspark.services.gateway.detokenize import TokenDecoder
from dspark.types import FinishReason, VerificationResult


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Text that came from one side; `drafted` if a drafter proposed it."""

    text: str
    drafted: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step adds: text that is certain, and the tokens it took in."""

    spans: tuple[TextSpan, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


class TextStream:
    """The text of one generation."""

    def __init__(self, decoder: TokenDecoder, stop: tuple[str, ...]) -> None:
        self._decoder, self._stop = decoder, StopFilter(stop)

    def push(self, result: VerificationResult) -> Piece:
        """Take in one step. A character belongs to the token that completes it."""
        spans: list[TextSpan] = []
        last = len(result.token_ids) - 1
        for i, token_id in enumerate(result.token_ids):
            drafted = i < result.accepted
            # The token that ended it is control, even where the tokenizer does not say so.
            silent = i == last and result.finish_reason is FinishReason.STOP
            text = "" if silent else self._decoder.push(token_id)
            if i == last and result.finish_reason is not None:
                text += self._decoder.flush()
            spans += self._stop.push(TextSpan(text, drafted))
            if self._stop.hit:
                return Piece(_joined(spans), result.token_ids[: i + 1], FinishReason.STOP)
        if result.finish_reason is not None:
            spans += self._stop.flush()
        return Piece(_joined(spans), result.token_ids, result.finish_reason)


class StopFilter:
    """Holds text back while it could become a stop string; `hit` once one is complete."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held: list[TextSpan] = []
        self.hit = False

    def push(self, span: TextSpan) -> list[TextSpan]:
        """Text that is certain to be outside every stop string."""
        if not self._stop:
            return [span]
        self._held.append(span)
        text = "".join(held.text for held in self._held)
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.hit = True
            released, self._held = self._take(min(found)[1]), []
            return released
        return self._take(len(text) - self._could_begin_one(text))

    def flush(self) -> list[TextSpan]:
        """What was held back, now that nothing follows."""
        released, self._held = self._held, []
        return released

    def _could_begin_one(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        return next((n for n in range(longest, 0, -1) if self._begins_one(text[-n:])), 0)

    def _begins_one(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stop)

    def _take(self, chars: int) -> list[TextSpan]:
        taken: list[TextSpan] = []
        while self._held and chars > 0:
            span = self._held.pop(0)
            taken.append(TextSpan(span.text[:chars], span.drafted))
            if len(span.text) > chars:
                self._held.insert(0, TextSpan(span.text[chars:], span.drafted))
            chars -= len(span.text)
        return taken


def _joined(spans: list[TextSpan]) -> tuple[TextSpan, ...]:
    joined: list[TextSpan] = []
    for span in spans:
        if joined and joined[-1].drafted == span.drafted:
            joined[-1] = TextSpan(joined[-1].text + span.text, span.drafted)
        elif span.text:
            joined.append(span)
    return tuple(joined)
