"""What drafting did for one request, counted from its steps."""

from __future__ import annotations

from dataclasses import dataclass

from dspark.types import VerificationResult


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Counts over the steps of one request. A step without a proposal is not a spec step."""

    steps: int
    drafted_tokens: int
    verified_tokens: int
    accepted_tokens: int
    verified_by_position: tuple[int, ...]
    accepted_by_position: tuple[int, ...]
    spec_steps: int
    acceptance_histogram: tuple[int, ...]  # [j]: spec steps that accepted j draft tokens

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens a spec step commits, the target's own included; None if there was none."""
        return 1 + self.accepted_tokens / self.spec_steps if self.spec_steps else None

    @property
    def draft_acceptance_rate(self) -> float | None:
        """Accepted ÷ proposed; None if nothing was proposed."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None


class SpeculationTally:
    """Counts while a request runs."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, int, int]] = []  # drafted, verified, accepted

    def add(self, result: VerificationResult) -> None:
        """Take in one step."""
        self._steps.append((result.drafted, result.verified, result.accepted))

    def stats(self) -> SpeculationStats:
        """The counts so far."""
        speculative = [step for step in self._steps if step[0]]
        drafted, verified, accepted = ([step[i] for step in speculative] for i in range(3))
        longest = max(drafted, default=0)
        return SpeculationStats(
            steps=len(self._steps),
            drafted_tokens=sum(drafted),
            verified_tokens=sum(verified),
            accepted_tokens=sum(accepted),
            verified_by_position=_by_position(verified),
            accepted_by_position=_by_position(accepted),
            spec_steps=len(speculative),
            acceptance_histogram=tuple(accepted.count(j) for j in range(longest + 1))
            if speculative
            else (),
        )


def _by_position(lengths: list[int]) -> tuple[int, ...]:
    """How many steps reached each block position."""
    return tuple(sum(n > p for n in lengths) for p in range(max(lengths, default=0)))
