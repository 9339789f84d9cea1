"""Does served output equal the target's own? Greedy, against transformers' `generate`.

Two correct implementations may round differently, and where the two best tokens are nearly tied the
argmax may fall either way. A difference counts as a near-tie only when the reference's two best
logits there, in fp32, lie within `NEAR_TIE`; all after it is another text and is not compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Of fp32 logits, by the precision in which the compared texts were computed. In bf16 a logit of the
# built-in target lies 0.1 from its fp32 value on average.
NEAR_TIE = {"float32": 1e-3, "bfloat16": 0.25}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt: where the texts part, if they do, and how close the reference's choice was."""

    length: int  # tokens compared
    diverges_at: int | None = None
    gap: float = 0.0  # between the reference's two best logits there
    near_tie: float = NEAR_TIE["float32"]

    @property
    def lossless(self) -> bool:
        """Equal, or parted at a near-tie."""
        return self.diverges_at is None or self.gap <= self.near_tie


class GreedyReference:
    """transformers alone: the unmodified model and its own generate()."""

    def __init__(self, model: Any, eos_token_ids: tuple[int, ...]) -> None:
        self._model = model.eval()
        self._eos = list(eos_token_ids) or None

    @torch.inference_mode()
    def tokens(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """The continuation that transformers chooses, end-of-text included."""
        ids = torch.tensor([list(prompt)])
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=self._eos,
        )
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens

    @torch.inference_mode()
    def gap(self, prefix: Sequence[int]) -> float:
        """Between the two best logits after `prefix`."""
        logits = self._model(torch.tensor([list(prefix)])).logits[0, -1].float()
        best = logits.topk(2).values
        return float(best[0] - best[1])

    def compare(
        self, prompt: Sequence[int], got: Sequence[int], want: Sequence[int], dtype: str = "float32"
    ) -> Comparison:
        """Hold `got` against `want`, both computed in `dtype`."""
        near_tie = NEAR_TIE[dtype]
        for i, (a, b) in enumerate(zip(got, want, strict=False)):
            if a != b:
                return Comparison(i, i, self.gap([*prompt, *want[:i]]), near_tie)
        if len(got) != len(want):
            short = min(len(got), len(want))
            return Comparison(short, short, float("inf"), near_tie)
        return Comparison(len(want), near_tie=near_tie)
