"""Blocks of any small causal LM: committed tokens into its own pages, then token by token.

The first pass of a round takes in what was committed since the last and the anchor; each of the
others one drafted token a session. Keys and values of drafted tokens lie where those of the
committed ones go in the next round, whether they stood or not.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from dspark.decoding.drawing import DrawnBlocks, DrawRules, draw, likeliest_logit
from dspark.engine.draft_sessions import Rows
from dspark.engine.drafting import Draft
from dspark.kernels.attention_plan import Pages, plan_attention
from dspark.kernels.transfer import to_device, to_host
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetBatch, TargetModel

BLOCK_SIZE = 4  # γ; each of its tokens is a pass of the drafter
_WARM_ROWS = 64  # sessions at once: more are rare, and soon captured


class AutoregressiveBlocks:
    """A Drafter (dspark.engine.drafting)."""

    block_size = BLOCK_SIZE
    feature_width = 0
    context_window = 0

    def __init__(self, model: TargetModel) -> None:
        self.vocab_size, self.trained_length = model.vocab_size, model.max_positions
        self.device = model.device
        self._model = model
        self._vocabulary = torch.arange(model.vocab_size, device=model.device)

    def rows(self, block_size: int) -> int:
        """See Drafter."""
        return block_size

    def draft(
        self, rows: Seq[Rows], wanting: Seq[Rows], kv: PagedKVCache, candidates: int
    ) -> list[Draft]:
        """See Drafter."""
        first: dict[Rows, torch.Tensor] = {}
        for wave in _waves(rows):
            first |= self._take_in(wave, frozenset(wanting), kv)
        if not wanting:
            return []
        # The longest first: those who are left at any position are the first ones.
        order = sorted(wanting, key=lambda row: -row.work.block_size)
        works = [row.work for row in order]
        most = works[0].block_size
        rules = DrawRules.of([w.fence for w in works], [w.sampling for w in works], most)
        present = rules.present()
        placed = to_device(rules.tensors, self.device)
        drawn = _Columns(len(works), most, min(candidates, self.vocab_size), self.device)
        logits = torch.stack([first[row] for row in order])
        for k in range(most):
            own = DrawRules(*(tensor[: len(logits)] for tensor in placed))
            tokens, ids, probs = draw(logits, self._vocabulary, own, present, k, candidates)
            drawn.put(k, tokens, likeliest_logit(logits), ids, probs)
            further = [row for row in order if row.work.block_size > k + 1]
            if further:
                (tokens,) = to_host([tokens[: len(further)]])
                logits = self._forward(
                    [row.session.pages for row in further],
                    [row.session.length + k + 1 for row in further],
                    list(tokens.split(1)),
                    torch.arange(len(further)),
                    kv,
                )
        return [Draft(works, rules.kinds.tolist(), drawn.blocks)]

    def warm_up(self, kv: PagedKVCache, candidates: int) -> None:
        """See Drafter."""
        if self._model.padded is not None:
            self._model.padded.warm_up(kv, _WARM_ROWS)

    def _take_in(
        self, wave: Seq[Rows], wanting: frozenset[Rows], kv: PagedKVCache
    ) -> dict[Rows, torch.Tensor]:
        """Write context, with the anchors of those who want a block: what may follow them [V]."""
        wave = [row for row in wave if len(row.context) or row in wanting]
        if not wave:
            return {}
        tokens = [
            torch.cat([row.context, row.context.new_tensor([row.work.anchor_token_id])])
            if row in wanting
            else row.context
            for row in wave
        ]
        ends = torch.tensor([len(one) for one in tokens]).cumsum(0) - 1
        own = [i for i, row in enumerate(wave) if row in wanting]
        logits = self._forward(
            [row.session.pages for row in wave], [row.start for row in wave], tokens, ends[own], kv
        )
        return dict(zip((wave[i] for i in own), logits, strict=True))

    def _forward(
        self,
        pages: Seq[Pages],
        starts: Seq[int],
        tokens: Seq[torch.Tensor],  # [n] each, on the host
        logit_rows: torch.Tensor,  # [N]
        kv: PagedKVCache,
    ) -> torch.Tensor:  # [N, V]
        plan = plan_attention(pages, starts, [len(one) for one in tokens], self.device)
        return self._model.forward(
            TargetBatch(torch.cat(list(tokens)), plan, logit_rows), kv
        ).logits


class _Columns:
    """Blocks that become known position by position; shorter ones are not filled to the end."""

    def __init__(self, sessions: int, size: int, candidates: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(sessions, size, *shape, dtype=dtype, device=device)

        self.blocks = DrawnBlocks(
            tokens=zeros(dtype=torch.int64),
            confidence_logits=zeros(dtype=torch.float32),
            candidate_ids=zeros(candidates, dtype=torch.int64),
            candidate_probs=zeros(candidates, dtype=torch.float32),
        )

    def put(self, position: int, *columns: torch.Tensor) -> None:
        """What DrawnBlocks holds of one position, for the first so many sessions."""
        for block, column in zip(self.blocks.tensors, columns, strict=True):
            block[: len(column), position] = column


def _waves(rows: Seq[Rows]) -> list[list[Rows]]:
    """Rows that may share a pass: those of one session see each other only once written."""
    waves: list[list[Rows]] = []
    for row in rows:
        if not waves or any(other.session is row.session for other in waves[-1]):
            waves.append([])
        waves[-1].append(row)
    return waves
