"""What a round of an engine was."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Round:
    """A step, and all since the one before."""

    requests: int  # for which a token was decided
    tokens: int  # that went through the target
    prefill: int  # of prompts, among them
    step_ms: float
    round_ms: float | None  # None: the engine rested in between
    waited_ms: float  # of it, for blocks
    overlapped: bool  # others were drafted for meanwhile
    first_use: bool  # something was captured in it, which takes its time once
