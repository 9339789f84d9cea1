"""Blocks of a DSpark drafter: features into pages, whole blocks in one pass (paper §3.1)."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from dspark.decoding.drawing import DrawRules
from dspark.engine.draft_sessions import Rows
from dspark.engine.drafting import Draft
from dspark.kernels.attention_plan import plan_attention
from dspark.kernels.transfer import to_device
from dspark.models.draft_forward import draft_forward
from dspark.models.drafter import DSparkDrafter
from dspark.models.kv_cache import PagedKVCache


class DSparkBlocks:
    """A Drafter (dspark.engine.drafting)."""

    def __init__(self, drafter: DSparkDrafter) -> None:
        """`drafter` is frozen and has the type and device that it runs in."""
        config = drafter.config
        self.block_size, self.vocab_size = config.block_size, config.vocab_size
        self.feature_width = config.hidden_size
        self.context_window, self.trained_length = config.context_window, config.trained_length
        self.device = drafter.norm.weight.device
        self._dtype = drafter.norm.weight.dtype
        self._drafter, self._forward = drafter, draft_forward(drafter)

    def rows(self, block_size: int) -> int:
        """See Drafter."""
        return self._drafter.config.rows(block_size)

    def draft(
        self, rows: Seq[Rows], wanting: Seq[Rows], kv: PagedKVCache, candidates: int
    ) -> list[Draft]:
        """See Drafter."""
        self._write([row for row in rows if len(row.context)], kv)
        of: dict[int, list[Rows]] = {}
        for row in wanting:
            of.setdefault(row.work.block_size, []).append(row)
        return [self._draft(own, size, kv, candidates) for size, own in sorted(of.items())]

    def warm_up(self, kv: PagedKVCache, candidates: int) -> None:
        """See Drafter."""
        self._forward.warm_up(kv, self._window(self.block_size), candidates)

    def _window(self, size: int) -> int | None:
        """Keys that the rows of a block see: its own, and the context."""
        return self.context_window + self.rows(size) if self.context_window else None

    def _write(self, rows: Seq[Rows], kv: PagedKVCache) -> None:
        if not rows:
            return
        where = plan_attention(
            [row.session.pages for row in rows],
            [row.start for row in rows],
            [len(row.context) for row in rows],
            self.device,
        )
        (features,) = to_device([torch.cat([row.context for row in rows])], self.device)
        features = features.to(self._dtype)
        self._forward.write_context(features, where.positions, where.slots, kv)

    def _draft(self, wanting: Seq[Rows], size: int, kv: PagedKVCache, candidates: int) -> Draft:
        works = [row.work for row in wanting]
        rows = self.rows(size)
        plan = plan_attention(
            [row.session.pages for row in wanting],
            [row.session.length for row in wanting],
            [rows] * len(works),
            self.device,
            block=True,
            window=self._window(size),
        )
        anchors = torch.tensor([w.anchor_token_id for w in works])
        tokens = self._drafter.block_tokens(anchors, size).flatten()
        hidden = self._forward.hidden(tokens, plan, kv).view(len(works), rows, -1)
        hidden = self._drafter.predicting(hidden).contiguous()
        rules = DrawRules.of([w.fence for w in works], [w.sampling for w in works], size)
        drawn = self._forward.draw(hidden, anchors, rules, candidates)
        return Draft(works, rules.kinds.tolist(), drawn)
