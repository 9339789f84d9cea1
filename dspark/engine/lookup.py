"""Drafting without a drafter: what followed the last time that the text said the same.

Summaries, edits of code and answers from documents repeat their prompt, and much text repeats
itself. Where a request's last few tokens have occurred before in its prompt or output, what came
after them then is drafted to come again (LLMA, arXiv 2304.04487). No model runs, so this is there
when no draft replica is, and costs next to nothing.

A block is a function of committed text alone. The law that it was drawn from is therefore a point:
q(x) = 1 for the drafted token, which rejection sampling accepts with p(x) and otherwise replaces by
a draw from p without x.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from dspark.engine.sequence import Sequence
from dspark.engine.text_index import Drafted, TextIndex
from dspark.types import BlockProposal

BLOCK_SIZE = 8  # γ, where no drafter has one
_PRIOR_CHANCE, _PRIOR_TOKENS = 0.5, 4.0  # belief before anything has been seen
_MEMORY = 256.0  # drafted tokens that a chance is over; then the older ones count half


@dataclass(slots=True)
class _Chance:
    """How often a kind of drafted token came, where all before it had come."""

    came: float = _PRIOR_CHANCE * _PRIOR_TOKENS
    of: float = _PRIOR_TOKENS

    def see(self, came: bool) -> None:
        if self.of >= _MEMORY:
            self.came, self.of = 0.5 * self.came, 0.5 * self.of
        self.came, self.of = self.came + came, self.of + 1.0


class PromptLookup:
    """Drafts from requests' own text. Belongs to one engine, and to its thread.

    Confidences are what blocks of the past came to, by length of match and position. That is seen
    in what was committed, verified or not: where nothing was, the target still said what it would.
    """

    def __init__(self) -> None:
        self._chances: defaultdict[tuple[int, int], _Chance] = defaultdict(_Chance)

    def propose(
        self,
        sequence: Sequence,
        size: int,  # γ
    ) -> BlockProposal | None:
        """A block after what is committed; None where the text says nothing for the first time."""
        tokens = sequence.tokens
        index = sequence.index = sequence.index or TextIndex()
        self._learn(index, tokens)
        match, start = index.find(tokens)
        if not match:
            return None
        # Where the text ends sooner than the block, it goes round: so do repetitions.
        period = len(tokens) - start
        token_ids = [tokens[start + k % period] for k in range(size)]
        index.drafted = Drafted(len(tokens), match, token_ids)
        chances = [self._chances[match, k] for k in range(size)]
        block = np.array(token_ids, dtype=np.int64)
        needs_law = sequence.request.sampling.needs_law
        return BlockProposal(
            fence=sequence.fence(),
            token_ids=block,
            confidences=np.array([c.came / c.of for c in chances], dtype=np.float32),
            candidate_ids=block[:, None] if needs_law else None,
            candidate_probs=np.ones((size, 1), dtype=np.float32) if needs_law else None,
        )

    def _learn(self, index: TextIndex, tokens: list[int]) -> None:
        drafted, index.drafted = index.drafted, None
        if drafted is None:
            return
        committed = tokens[drafted.start : drafted.start + len(drafted.token_ids)]
        for k, (said, token) in enumerate(zip(committed, drafted.token_ids, strict=False)):
            self._chances[drafted.match, k].see(said == token)
            if said != token:
                return
