"""In how many rounds blocks of a drafter paid, or would have if there had been one to ask."""

from __future__ import annotations

from dspark.scheduling.draft_gate import DraftGate
from dspark.scheduling.planner import Search
from dspark.scheduling.round_times import load_of

_LOOK_EVERY = 32  # rounds, at whether a drafter that is away is missed; or at another load


class DraftDemand:
    """Counts since the start. A gate of None asks for blocks whatever they bring."""

    def __init__(self) -> None:
        self.rounds = self.wanting = 0
        self._looked_at, self._load, self._missed = 0, -1, False

    def count(self, gate: DraftGate | None) -> None:
        """A round with a drafter at hand, after the gate was asked."""
        self.wanting += gate is None or gate.open

    def count_without(
        self, gate: DraftGate | None, requests: int, most: int, latency_ms: float, search: Search
    ) -> None:
        """A round in which the drafter could not be asked."""
        load = load_of(requests)
        if load != self._load or self.rounds - self._looked_at >= _LOOK_EVERY:
            self._looked_at, self._load = self.rounds, load
            self._missed = gate is None or gate.would_pay(requests, most, latency_ms, search)
        self.wanting += self._missed
