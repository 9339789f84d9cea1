"""When drafting is tried again at a load where it does not pay.

A few rounds in a row are drafted now and then, since texts change and machines do: the first rounds
after a start are often slow. Pauses grow until the time that this takes is a small share. Where
drafting clearly loses, a few of many requests are drafted for: they show what texts are like, at a
fraction of the cost. They do not show what rounds with blocks for all take, which may have been
measured at an odd moment: so it is measured again, soon where it might change the verdict.
"""

from __future__ import annotations

from dataclasses import dataclass

PROBE_WIDTH = 4  # requests that a probe drafts for where it cannot be close
LEAST_GAIN = 1.0  # from which drafting pays
LONGEST_PAUSE = 2048  # rounds
DOUBT = 0.5  # share of what rounds with blocks seem to take more than others that may be an error
_FIRST_PAUSE = 16  # rounds
_PAUSE_GROWTH = 4  # a start is over after few probes, and what loses then mostly goes on losing
_PROBE_ROUNDS = 3  # in a row, so that what only the first of them suffers from does not count
_PROBE_SHARE = 0.004  # of the time, spent on probing in the long run
_CLOSE_CALL = 0.9  # gain; what is below is not put down to a mistake about times
_WIDE_SHARE = 0.002  # of the time, spent on drafting for all where it looks hopeless
_FIRST_WIDE = 64  # rounds before that is first done where it may change the verdict
_WIDE_GROWTH = 4  # and before each further time, until the share is kept
_UNMEASURED_PROBES = 2  # before drafting for all is timed at a load, however bad it looks
_HOPEFUL_PROBES = 3  # that come soon at a load where drafting may pay and has not been timed
_SHORT_PAUSE = 4  # before each of them


@dataclass(slots=True)
class ClosedLoad:
    """A load at which drafting does not pay, or did not a moment ago, which may be right."""

    rest: int = 0  # rounds that are left of the pause under way
    probe: int = 0  # and of the probe after it
    narrow: bool = False  # that probe: it drafts for a few requests
    _first: bool = False  # of that probe, the next round
    _pause: int = _FIRST_PAUSE  # the next one
    _probes: int = 0  # so far
    _wides: int = 0  # of these, for all
    _since_wide: int = 0  # rounds since one drafted for all
    _since_open: int = 0  # rounds since it paid after all

    def open(self) -> bool:
        """A round is drafted because that pays; whether it has for so long that this is over.

        An estimate at an odd moment opens, too: what it loses must not come again and again.
        """
        self.rest = self.probe = 0
        self._since_open += 1
        return self._since_open > self._pause

    def begin(
        self,
        requests: int,
        cost: float,  # of drafting for all, in rounds without
        few_cost: float | None,  # the same for PROBE_WIDTH of them; None: not measured
        *,
        known: bool,  # whether drafting for all has been measured at this load
        gain: float,  # of drafting, over not drafting
        hope: float,  # the same, were drafting as cheap as at smaller loads
        doubt: float,  # the same, were DOUBT of its cost an error
    ) -> None:
        """The next pause, and the probe after it."""
        hopeless = gain < _CLOSE_CALL and (known or self._probes < _UNMEASURED_PROBES)
        if hopeful := hope > LEAST_GAIN and not known and self._probes < _HOPEFUL_PROBES:
            hopeless = False
        wide_from = _PROBE_ROUNDS * cost / _WIDE_SHARE
        if doubt > LEAST_GAIN:
            wide_from = min(wide_from, _FIRST_WIDE * _WIDE_GROWTH**self._wides)
        overdue = known and self._since_wide + self._pause >= wide_from
        self.narrow = hopeless and requests > PROBE_WIDTH and not overdue
        if self.narrow:
            # Much of what a GPU drafts in is the same for few and for many.
            cost = cost * PROBE_WIDTH / requests if few_cost is None else few_cost
        else:
            self._since_wide, self._wides = 0, self._wides + 1
        self.rest, self._first = _SHORT_PAUSE if hopeful else self._pause, True
        self.probe = _PROBE_ROUNDS + (overdue or not known)  # times leave the first out
        self._probes += 1
        enough = int(max(_PROBE_ROUNDS * cost / _PROBE_SHARE, _FIRST_PAUSE))
        self._pause = min(_PAUSE_GROWTH * self._pause, enough, LONGEST_PAUSE)

    def round(self) -> None:
        """A round in which drafting does not pay."""
        self._since_open = 0
        self._since_wide += 1

    def size(self, best: int, most: int) -> int:
        """Draft tokens of this round's blocks, the whole block first: to see the text as it is."""
        if self.rest:
            self.rest -= 1
            return 0
        self.probe -= 1
        first, self._first = self._first, False
        return most if first else best
