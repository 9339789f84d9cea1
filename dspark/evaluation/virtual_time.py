"""The engine on a machine that is only told about: what its decisions cost, without any noise.

Everything that decides is the real one: step loop, gate, planner, draft policy, calibration. Target
and drafter compute nothing. The target says t + 1 after t, blocks stand as long as recorded or made
up ones did, and both move a clock on by what a machine would take for them. So two settings can be
held against each other to a tenth of a percent, which no machine that others share allows.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock
from zlib import crc32

import numpy as np
import torch
from torch import nn

from dspark.config import EngineConfig
from dspark.decoding.drawing import DrawnBlocks, DrawRules
from dspark.engine.draft_link import LocalDraftLink
from dspark.engine.draft_sessions import Rows
from dspark.engine.drafting import Draft, DraftEngine
from dspark.engine.verifier import VerifierEngine
from dspark.evaluation.throughput import Turn, Users
from dspark.kernels.attention_plan import pages_for
from dspark.models.drafter import FeatureProjection
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetBatch, TargetOutput
from dspark.scheduling.step_table import StepTimeTable
from dspark.types import Fence, FloatArray, StepPlan

_VOCABULARY = 64
_POSITIONS = 1 << 20
_PROMPT = tuple(range(40))
_STRETCH = 64  # tokens of a text that are of one kind


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def advance(self, ms: float) -> None:
        """So much passes."""
        self.now_s += ms / 1e3

    def _read_s(self) -> float:
        return self.now_s

    @contextmanager
    def running(self) -> Iterator[None]:
        """What the process reads as its monotonic time is this clock's, inside."""
        with (
            mock.patch.object(time, "perf_counter", self._read_s),
            mock.patch.object(time, "monotonic", self._read_s),
        ):
            yield


@dataclass(frozen=True, slots=True)
class Machine:
    """What things take, in milliseconds."""

    step: StepTimeTable
    draft_ms: Callable[[int, int], float]  # (requests, draft tokens of a block)
    jitter: float = 0.0  # standard deviation of the logarithm of each time
    slow: float = 1.0  # times as long every other moment
    moment_s: float = 0.3


class _Passing:
    """Moves a clock on by a machine's times."""

    def __init__(self, clock: Clock, machine: Machine) -> None:
        self._clock, self.machine = clock, machine
        self._random = random.Random(0)

    def spend(self, ms: float) -> None:
        machine = self.machine
        slow = machine.slow if int(self._clock.now_s / machine.moment_s) % 2 else 1.0
        self._clock.advance(ms * slow * math.exp(machine.jitter * self._random.gauss(0.0, 1.0)))


@dataclass(frozen=True, slots=True)
class Blocks:
    """What texts' blocks are like: confidences, and how many tokens stood; some for each kind."""

    confidences: Sequence[FloatArray]  # of each kind [N, γ]
    accepted: Sequence[np.ndarray[Any, np.dtype[np.int64]]]  # of each kind [N]

    @property
    def block_size(self) -> int:
        """γ."""
        width: int = self.confidences[0].shape[1]
        return width

    @classmethod
    def made_up(
        cls, chances: Sequence[float], block_size: int, count: int = 256, seed: int = 0
    ) -> Blocks:
        """Kinds of text whose tokens stand by so many chances on the average.

        Confidences are spread over [0, 1] and say the truth, as calibrated ones almost do.
        """
        generator = np.random.default_rng(seed)
        confidences, accepted = [], []
        for chance in chances:
            # One block is harder than another, and a position than the next.
            hardness = generator.beta(3.0 * chance, 3.0 * (1.0 - chance), (count, 1))
            spread = generator.beta(1.0 + 6.0 * hardness, 1.0 + 6.0 * (1.0 - hardness),
                                    (count, block_size))  # fmt: skip
            stands = generator.random(spread.shape) < spread
            confidences.append(spread.astype(np.float32))
            accepted.append(np.cumprod(stands, axis=1).sum(axis=1))
        return cls(confidences, accepted)


class _Target:
    """What a verifier needs of a TargetModel."""

    vocab_size, max_positions = _VOCABULARY, _POSITIONS
    device = torch.device("cpu")

    def __init__(self, passing: _Passing) -> None:
        self._passing = passing

    def forward(self, batch: TargetBatch, kv: PagedKVCache) -> TargetOutput:
        lengths, counts = batch.attention.kv_lens, batch.attention.row_counts
        context = (sum(lengths) - sum(counts)) / len(counts)
        self._passing.spend(self._passing.machine.step.ms(len(counts), sum(counts), context))
        following = (batch.token_ids[batch.logit_rows] + 1) % _VOCABULARY
        logits = torch.nn.functional.one_hot(following, _VOCABULARY).float()
        return TargetOutput(logits, torch.zeros(len(batch.token_ids), 1))

    def check(self) -> None:
        """It has no parts elsewhere."""


class _Drafter:
    """A Drafter (dspark.engine.drafting)."""

    vocab_size, feature_width = _VOCABULARY, 1
    context_window = trained_length = 0
    device = torch.device("cpu")

    def __init__(self, passing: _Passing, blocks: Blocks) -> None:
        self._passing, self._blocks = passing, blocks
        self.block_size = blocks.block_size

    def rows(self, block_size: int) -> int:
        return block_size

    def draft(
        self, rows: Sequence[Rows], wanting: Sequence[Rows], kv: PagedKVCache, candidates: int
    ) -> list[Draft]:
        of: dict[int, list[Rows]] = {}
        for row in wanting:
            of.setdefault(row.work.block_size, []).append(row)
        return [self._draft(own, size) for size, own in sorted(of.items())]

    def warm_up(self, kv: PagedKVCache, candidates: int) -> None:
        pass

    def _draft(self, wanting: Sequence[Rows], size: int) -> Draft:
        self._passing.spend(self._passing.machine.draft_ms(len(wanting), size))
        works = [row.work for row in wanting]
        confidences, accepted = zip(*(self._block(work.fence) for work in works), strict=True)
        steps = np.arange(1, size + 1)
        right = np.array([work.anchor_token_id for work in works])[:, None] + steps
        wrong = steps > np.array(accepted)[:, None]
        law = torch.zeros(len(works), size, 0)
        drawn = DrawnBlocks(
            torch.from_numpy((right + wrong) % _VOCABULARY),
            torch.logit(torch.from_numpy(np.stack(confidences)[:, :size]), eps=1e-6),
            law.long(),
            law,
        )
        rules = DrawRules.of([w.fence for w in works], [w.sampling for w in works], size)
        return Draft(works, rules.kinds.tolist(), drawn)

    def _block(self, fence: Fence) -> tuple[FloatArray, int]:
        """Each text goes through all blocks of a kind in turn, so that settings soon had the same.

        Texts change from kind to kind on their way, not all at the same place.
        """
        blocks, text = self._blocks, crc32(fence.session.encode())
        kind = (text + fence.committed_len // _STRETCH) % len(blocks.accepted)
        pick = (text + fence.round) % len(blocks.accepted[kind])
        return blocks.confidences[kind][pick], int(blocks.accepted[kind][pick])


def virtual_verifier(
    clock: Clock,
    machine: Machine,
    blocks: Blocks,
    config: EngineConfig,
    *,
    believed: StepTimeTable | None = None,  # the engine's table; None: the machine's own
) -> VerifierEngine:
    """A verifier of such a machine, with its drafter; `serve` steps it."""
    passing = _Passing(clock, machine)
    drafter = DraftEngine(_Drafter(passing, blocks), pages_for(config.cache_tokens) + 1)
    verifier = VerifierEngine(
        _Target(passing),  # type: ignore[arg-type]  # all that an engine asks of one
        config,
        projection=FeatureProjection(nn.Identity(), nn.Identity()),
        link=LocalDraftLink(drafter),
        block_size=blocks.block_size,
    )
    verifier.table = believed or machine.step
    return verifier


def serve(
    verifier: VerifierEngine,  # a virtual one
    clock: Clock,
    plan: StepPlan,
    *,
    users: int,
    seconds: float,
    answer_tokens: int = 256,
) -> Turn:
    """So many users, each asking again as soon as it is answered, by one plan."""
    with clock.running():
        verifier.set_plan(plan)
        return Users(verifier, [_PROMPT], users, answer_tokens).work(seconds)
