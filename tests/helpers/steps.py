"""Steps of a target over pages, as an engine would plan them."""

from __future__ import annotations

import torch

from dspark.kernels.attention_plan import Pages, plan_attention
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetBatch, TargetModel, TargetOutput

# Rows of each of four sequences: a prompt before there is memory, then decoding and blocks, 16 to a
# sequence at most, some of which cross into another page, and prompts that go on beside them.
STEPS = (
    (20, 5, 0, 30), (1, 1, 1, 1), (5, 0, 1, 3), (1, 16, 1, 1), (0, 0, 14, 1), (9, 1, 2, 4),
    (1, 20, 3, 17),
)  # fmt: skip


class Cache:
    """Four sequences on pages of their own, and what has been run of each."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, 64, (4, 64), generator=generator)
        shuffled = torch.randperm(16, generator=generator).numpy().astype("int32") + 1
        self.pages: list[Pages] = [shuffled[s * 4 : (s + 1) * 4] for s in range(4)]
        self.kv = PagedKVCache(17)
        self.done = [0] * 4

    def step(
        self, target: TargetModel, rows: tuple[int, ...], logit_rows: torch.Tensor | None = None
    ) -> TargetOutput:
        active = [s for s, n in enumerate(rows) if n]
        spans = [(s, self.done[s], self.done[s] + rows[s]) for s in active]
        for s, _, end in spans:
            self.done[s] = end
        plan = plan_attention(
            [self.pages[s] for s in active], [a for _, a, _ in spans], [rows[s] for s in active]
        )
        tokens = torch.cat([self.tokens[s, a:b] for s, a, b in spans])
        wanted = torch.arange(sum(rows)) if logit_rows is None else logit_rows
        return target.forward(TargetBatch(tokens, plan, wanted), self.kv)
