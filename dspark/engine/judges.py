"""What is known of times and blocks, for a drafter and for looked up blocks apart."""

from __future__ import annotations

from typing import NamedTuple

from dspark.scheduling.draft_gate import DraftGate
from dspark.scheduling.draft_policy import DraftPolicy
from dspark.scheduling.round_times import RoundTimes
from dspark.scheduling.step_table import StepTimeTable


class Judge(NamedTuple):
    """Of blocks from one source: they cost and bring unlike those of the other."""

    times: RoundTimes
    gate: DraftGate
    policy: DraftPolicy

    @classmethod
    def of(cls, table: StepTimeTable) -> Judge:
        """One that has seen nothing but the table."""
        times = RoundTimes(table)
        return cls(times, DraftGate(times), DraftPolicy(times))


class Judges:
    """One verifier's. There are none before there is a step-time table."""

    def __init__(self, *, has_drafter: bool) -> None:
        self.looks_up = not has_drafter  # whether the latest blocks were looked up, not drafted
        self._both: tuple[Judge, Judge] | None = None  # of the drafter, of looked up blocks

    @property
    def table(self) -> StepTimeTable | None:
        """The step-time table; without one, `adaptive` verifies whole blocks."""
        return None if self._both is None else self._both[0].times.table

    @table.setter
    def table(self, table: StepTimeTable) -> None:
        self._both = Judge.of(table), Judge.of(table)

    @property
    def now(self) -> Judge | None:
        """Of the source of the latest blocks."""
        return None if self._both is None else self._both[self.looks_up]

    @property
    def of_drafter(self) -> Judge | None:
        """Of the drafter's blocks, whether it can be asked or not."""
        return None if self._both is None else self._both[0]

    def set_context(self, tokens: float) -> None:
        """Running requests have so many committed tokens each, on the average."""
        for judge in self._both or ():
            judge.times.set_context(tokens)
