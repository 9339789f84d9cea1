"""Draft sessions: blocks depend on committed text alone, and are drawn from the law they carry."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import tiny_drafter, tiny_target
from scipy import stats

from dspark.engine import drafting
from dspark.engine.drafting import DraftEngine
from dspark.engine.dspark_blocks import DSparkBlocks
from dspark.engine.judge import Judged, judge
from dspark.types import (
    BlockProposal,
    DraftWork,
    Fence,
    Request,
    ResyncRequest,
    SamplingParams,
    VerifyMode,
)

TARGET = tiny_target()
DRAFTER = tiny_drafter(TARGET)
WIDTH = DRAFTER.config.hidden_size
FEATURES = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(0))
GREEDY = SamplingParams(temperature=0.0)


def engine(num_pages: int = 32) -> DraftEngine:
    return DraftEngine(DSparkBlocks(DRAFTER), num_pages)


def work(
    session: str = "s",
    length: int = 20,
    start: int = 0,
    *,
    epoch: int = 0,
    block_size: int = 4,
    sampling: SamplingParams = GREEDY,
    offset: int = 0,
) -> DraftWork:
    """Features `start` .. `length`-1 and an anchor at `length`."""
    return DraftWork(
        Fence(session, epoch, 0, length + 1),
        start,
        FEATURES[start + offset : length + offset],
        (length + offset) % 32,
        block_size,
        sampling,
    )


def block(draft: DraftEngine, *works: DraftWork) -> BlockProposal:
    """The block that the last of some works is answered with."""
    proposals, resyncs = draft.run(works)
    assert not resyncs
    return proposals[-1]


def same(a: BlockProposal, b: BlockProposal) -> bool:
    return a.token_ids.tolist() == b.token_ids.tolist() and a.confidences.tolist() == pytest.approx(
        b.confidences.tolist(), abs=1e-5
    )


def test_a_block_is_the_same_however_its_features_came() -> None:
    want = block(engine(), work())
    pieces = [work(length=7, block_size=0), work(length=16, start=7), work(start=16)]
    assert same(block(engine(), *pieces), want)
    repeated = [work(length=12), work(length=15, start=4), work(start=10)]
    assert same(block(engine(), *repeated), want)


def test_a_block_is_the_same_whoever_shares_the_batch() -> None:
    others = [work("a", 3, offset=20), work("b", 37, block_size=2), work("c", 0)]
    proposals, _ = engine().run([*others, work()])
    (own,) = [p for p in proposals if p.fence.session == "s"]
    assert same(own, block(engine(), work()))
    assert {p.fence.session: len(p.token_ids) for p in proposals} == {
        "a": 4,
        "b": 2,
        "c": 4,
        "s": 4,
    }


def test_a_gap_is_answered_for_its_own_session_only() -> None:
    draft = engine()
    draft.run([work(length=5)])
    proposals, resyncs = draft.run([work(start=9), work("other")])
    assert resyncs == [ResyncRequest("s", 0, 5)]
    assert [p.fence.session for p in proposals] == ["other"]
    assert same(block(draft, work(start=5)), block(engine(), work()))


def test_a_block_needs_every_feature_before_its_anchor() -> None:
    short = DraftWork(Fence("s", 0, 0, 21), 0, FEATURES[:19], 20, 4, GREEDY)
    assert engine().run([short]) == ([], [ResyncRequest("s", 0, 0)])


def test_work_that_a_later_one_overtook_gets_no_block() -> None:
    draft = engine()
    draft.run([work(length=30)])
    assert draft.run([work(length=20)]) == ([], [])


def test_a_new_epoch_starts_over() -> None:
    draft = engine()
    draft.run([work(offset=30)])
    assert draft.run([work(start=10, epoch=1)])[1] == [ResyncRequest("s", 1, 0)]
    assert same(block(draft, work(epoch=1)), block(engine(), work()))


def test_freeing_gives_everything_back() -> None:
    draft = engine()
    free = draft.held.pool.free
    draft.run([work(), work("other")])
    assert draft.sessions == 2
    for session in ("s", "other", "s", "unknown"):
        draft.free(session)
    assert (draft.sessions, draft.held.pool.free) == (0, free)


def test_the_least_recently_used_session_makes_room() -> None:
    draft = engine(num_pages=1 + 6)  # three sessions of twenty positions and a block
    for session in ("a", "b", "c"):
        draft.run([work(session)])
    draft.run([work("a", 21, start=20)])
    draft.run([work("d")])
    _, resyncs = draft.run([work(s, 22, start=20) for s in ("a", "b")])
    assert resyncs == [ResyncRequest("b", 0, 0)]


def test_a_session_that_can_never_fit_harms_nobody() -> None:
    proposals, resyncs = engine(num_pages=3).run([work(length=50), work("other")])
    assert resyncs == [ResyncRequest("s", 0, 0)]
    assert [p.fence.session for p in proposals] == ["other"]


@pytest.mark.statistical
def test_tokens_are_drawn_from_the_law_that_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """χ² of the first token over 4000 seeds; fails by chance once in 10,000 sets of seeds.

    The law is cut to five candidates, and by top-p to fewer: a draw from the uncut law would show.
    """
    monkeypatch.setattr(drafting, "CANDIDATES", 5)
    works = [work(str(i), sampling=SamplingParams(seed=i, top_p=0.95)) for i in range(4000)]
    draft = engine(num_pages=2 * 50 + 1)
    proposals = [p for i in range(0, 4000, 50) for p in draft.run(works[i : i + 50])[0]]
    first = proposals[0]
    assert first.candidate_ids is not None
    assert first.candidate_probs is not None
    law = dict(zip(first.candidate_ids[0].tolist(), first.candidate_probs[0].tolist(), strict=True))
    law = {token: p for token, p in law.items() if p > 0}
    assert len(law) > 1
    drawn = [int(p.token_ids[0]) for p in proposals]
    assert set(drawn) <= set(law)
    seen = [drawn.count(token) for token in law]
    wanted = [4000 * p for p in law.values()]
    assert stats.chisquare(seen, wanted, sum_check=False).pvalue > 1e-4


def test_a_law_is_sent_only_where_it_is_needed() -> None:
    coupled = SamplingParams(mode=VerifyMode.COUPLED)
    works = [work("a"), work("b", sampling=coupled), work("c", sampling=SamplingParams())]
    proposals = {p.fence.session: p for p in engine().run(works)[0]}
    assert {s: p.candidate_ids is not None for s, p in proposals.items()} == {
        "a": False,
        "b": False,
        "c": True,
    }


def test_coupled_drafts_stand_where_the_target_agrees_with_the_drafter() -> None:
    """Same law, same noise: a target that says what the drafter says accepts all it drafts."""
    for seed in range(20):
        sampling = SamplingParams(mode=VerifyMode.COUPLED, seed=seed, temperature=0.8)
        proposal = block(engine(), work(sampling=sampling))
        twin = block(engine(), work(sampling=SamplingParams(temperature=0.8)))
        assert twin.candidate_ids is not None
        assert twin.candidate_probs is not None
        # The first position's law does not depend on what was drawn; judge that one.
        logits = torch.full((2, 32), float("-inf"))
        logits[0, twin.candidate_ids[0]] = torch.from_numpy(twin.candidate_probs[0]).log() * 0.8
        logits[1, 0] = 0.0
        request = Request("s", (0,) * 21, sampling)
        (verdict,) = judge(logits, [Judged(request, proposal.fence, proposal, 1)])
        assert verdict.accepted == 1
