"""Whether drafting pays at all, by what it has lately brought (promise: never slower than without).

Algorithm 1 sees the block when it has been paid for, and can only trim. Under a load where nothing
of a block is worth verifying, the drafting itself is the loss. The gate compares the throughput of
recent speculative rounds, drafting included, with what plain rounds of the same size would give,
and pauses drafting when it is behind; it probes again after a pause that doubles while probes fail.

It looks at finished rounds only, never at the block at hand, so it cannot bias what is emitted.
"""

from __future__ import annotations

from dataclasses import dataclass

_MEMORY = 0.8  # weight of the past in the running gain
_PROBE_ROUNDS = 4
_FIRST_PAUSE = 16  # rounds
_LONGEST_PAUSE = 512


@dataclass(slots=True)
class DraftGate:
    """Open: blocks are asked for. One gate a verifier, asked once a round."""

    gain: float = 1.0  # speculative throughput over plain, running
    _pause: int = 0
    _next_pause: int = _FIRST_PAUSE
    _probes_left: int = _PROBE_ROUNDS
    _requests: int = 0

    @property
    def open(self) -> bool:
        """Whether to draft in the coming round."""
        return self._pause == 0

    def record(self, *, requests: int, committed: int, round_ms: float, plain_ms: float) -> None:
        """A speculative round committed `committed` tokens in `round_ms`, drafting included.

        `plain_ms` is what a step of the same requests without drafts takes.
        """
        if not requests or committed < requests:
            return
        if not self._requests / 2 <= requests <= self._requests * 2:
            # Another load altogether: what was learnt under the last one says little.
            self._requests, self.gain = requests, 1.0
            self._probes_left, self._next_pause = _PROBE_ROUNDS, _FIRST_PAUSE
        gain = (committed / round_ms) / (requests / plain_ms)
        self.gain = _MEMORY * self.gain + (1.0 - _MEMORY) * gain
        if self._probes_left > 0:
            self._probes_left -= 1
            return
        if self.gain < 1.0:
            self._pause = self._next_pause
            self._next_pause = min(2 * self._next_pause, _LONGEST_PAUSE)
            self._probes_left, self.gain = _PROBE_ROUNDS, 1.0
        else:
            self._next_pause = _FIRST_PAUSE

    def tick(self, requests: int) -> None:
        """A plain round passed; a load that changed much ends the pause."""
        if self._pause:
            changed = not self._requests / 2 <= requests <= self._requests * 2
            self._pause = 0 if changed else self._pause - 1
