"""A causal LM as the drafter: blocks are its own continuations, and output stays the target's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny import (
    autoregressive_link,
    hf_model,
    run,
    save_models,
    tiny_causal_drafter,
    tiny_engine,
    tiny_target,
)

from dspark import LLM
from dspark.config import EngineConfig
from dspark.engine.autoregressive import BLOCK_SIZE, AutoregressiveBlocks
from dspark.engine.draft_link import LocalDraftLink
from dspark.engine.drafting import DraftEngine
from dspark.errors import CheckpointError, ConfigError
from dspark.models.causal_drafter import is_causal_lm
from dspark.types import (
    BlockProposal,
    DraftWork,
    Fence,
    Request,
    ResyncRequest,
    SamplingParams,
    VerifyMode,
)

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
TARGET = tiny_target()
DRAFTER = tiny_causal_drafter()
TEXT = torch.randint(0, 32, (80,), generator=torch.Generator().manual_seed(0))
GREEDY = SamplingParams(temperature=0.0, max_tokens=60)
COUPLED = replace(GREEDY, temperature=0.8, mode=VerifyMode.COUPLED)


def engine(num_pages: int = 64) -> DraftEngine:
    return DraftEngine(AutoregressiveBlocks(DRAFTER), num_pages)


def work(
    session: str = "s", length: int = 20, start: int = 0, *, block_size: int = 4, epoch: int = 0
) -> DraftWork:
    """Token ids `start` .. `length`-1 and the anchor after them."""
    return DraftWork(
        fence=Fence(session, epoch, 0, length + 1),
        feature_start=start,
        features=torch.zeros(0, 0),
        anchor_token_id=int(TEXT[length]),
        block_size=block_size,
        sampling=GREEDY,
        token_ids=TEXT[start:length],
    )


def blocks(draft: DraftEngine, *works: DraftWork) -> list[BlockProposal]:
    proposals, resyncs = draft.run(works)
    assert not resyncs
    return proposals


def own_continuation(length: int, size: int) -> list[int]:
    """What the drafter says greedily after an anchor at `length`, by transformers alone."""
    model = hf_model()
    model.model.layers = model.model.layers[:-1]
    state = DRAFTER.model.state_dict()
    model.load_state_dict(state)
    tokens = TEXT[: length + 1].tolist()
    with torch.inference_mode():
        for _ in range(size):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[length + 1 :]


def test_a_block_is_the_drafters_own_continuation_however_its_context_came() -> None:
    want = own_continuation(20, 4)
    (whole,) = blocks(engine(), work())
    assert whole.token_ids.tolist() == want
    pieces = [work(length=7, block_size=0), work(length=16, start=7), work(start=16)]
    assert blocks(engine(), *pieces)[-1].token_ids.tolist() == want
    draft = engine()
    blocks(draft, work(length=12))  # what it drafts lies where these tokens go
    assert blocks(draft, work(start=12))[0].token_ids.tolist() == want
    assert blocks(draft, work(start=5))[0].token_ids.tolist() == want
    assert ((whole.confidences > 0) & (whole.confidences < 1)).all()


def test_a_block_is_the_same_whoever_shares_the_batch() -> None:
    works = [work("a", 3, block_size=2), work("b", 37), work("c", 0, block_size=1), work("d", 5)]
    got = {p.fence.session: p.token_ids.tolist() for p in blocks(engine(), *works)}
    assert got == {
        w.fence.session: own_continuation(w.fence.committed_len - 1, w.block_size) for w in works
    }


def test_a_gap_a_new_epoch_and_an_eviction_are_answered_for_that_session_only() -> None:
    draft = engine(num_pages=1 + 4)  # two sessions of twenty tokens and a block
    blocks(draft, work())
    _, resyncs = draft.run([work(length=30, start=25)])
    assert resyncs == [ResyncRequest("s", 0, 20)]
    assert draft.run([work(start=10, epoch=1)])[1] == [ResyncRequest("s", 1, 0)]
    blocks(draft, work(epoch=1))
    blocks(draft, work("a"))
    blocks(draft, work("b"))  # takes the pages of s
    _, resyncs = draft.run([work(length=21, start=20, epoch=1), work("b", 21, 20)])
    assert resyncs == [ResyncRequest("s", 1, 0)]
    for session in ("s", "a", "b", "unknown"):
        draft.free(session)
    draft.check_pages()
    assert draft.sessions == 0


@pytest.mark.parametrize("sampling", [GREEDY, COUPLED], ids=["greedy", "coupled"])
@pytest.mark.parametrize("budget_seed", [None, 3])
def test_output_is_that_of_plain_decoding(
    sampling: SamplingParams, budget_seed: int | None
) -> None:
    requests = [Request(str(n), PROMPT[:n], replace(sampling, seed=n)) for n in (1, 2, 5, 8)]
    plain = run(tiny_engine(TARGET), requests)
    link = autoregressive_link(DRAFTER, num_pages=12)  # too few for all: some are evicted
    tally = run(tiny_engine(TARGET, link=link), requests, budget_seed=budget_seed)
    assert tally.verified > 0, "INCONCLUSIVE: nothing was verified"
    assert tally.accepted > 0, "INCONCLUSIVE: nothing was accepted"
    assert tally.tokens == plain.tokens


def test_a_target_that_drafts_for_itself_accepts_everything() -> None:
    link = autoregressive_link(tiny_target())
    one = Request("a", PROMPT, replace(GREEDY, max_tokens=1 + 10 * (BLOCK_SIZE + 1)))
    tally = run(tiny_engine(TARGET, link=link), [one])
    assert [r.accepted for r in tally.results] == [0] + [BLOCK_SIZE] * 10


def test_a_drafter_that_forgot_is_sent_the_tokens_again() -> None:
    class Forgetful(LocalDraftLink):
        rounds = 0

        def submit(self, works: Sequence[DraftWork]) -> None:
            self.rounds += 1
            if self.rounds % 5 == 0:
                self._engine.free("a")
            super().submit(works)

    one = Request("a", PROMPT, GREEDY)
    whole = run(tiny_engine(TARGET, link=autoregressive_link(tiny_target())), [one])
    link = Forgetful(DraftEngine(AutoregressiveBlocks(tiny_target()), 64))
    again = run(tiny_engine(TARGET, link=link), [one])
    assert again.tokens == whole.tokens
    assert link.rounds > 10
    assert 0 < again.accepted < whole.accepted  # a round is lost each time


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target, and a causal LM of the same vocabulary."""
    target, dspark_drafter = save_models(tmp_path_factory.mktemp("target"))
    drafter, _ = save_models(tmp_path_factory.mktemp("drafter"))
    assert is_causal_lm(drafter)
    assert not is_causal_lm(dspark_drafter)
    return target, drafter


def test_a_folder_with_a_causal_lm_is_a_drafter(folders: tuple[Path, Path]) -> None:
    target, drafter = map(str, folders)
    settings = EngineConfig(policy="fixed", cache_tokens=1024)
    sampling = replace(COUPLED, max_tokens=30)
    prompts = [[5, 6, 7], [8, 9]]
    drafted = LLM(target, drafter, dtype="float32", engine=settings).generate(prompts, sampling)
    plain = LLM(target, "none", dtype="float32", engine=settings).generate(prompts, sampling)
    assert sum(g.accepted for g in drafted) > 0, "INCONCLUSIVE: nothing was accepted"
    assert [g.token_ids for g in drafted] == [g.token_ids for g in plain]


def changed(folder: Path, to: Path, file: str, change: dict[str, object]) -> str:
    """A copy of a model folder with some fields of one of its files set anew."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    content = json.loads((to / file).read_text())
    (to / file).write_text(json.dumps(content | change))
    return str(to)


def test_another_vocabulary_is_refused_by_name(folders: tuple[Path, Path], tmp_path: Path) -> None:
    target, drafter = folders
    more = changed(drafter, tmp_path / "more", "config.json", {"vocab_size": 7})
    with pytest.raises(CheckpointError, match="vocab_size 7"):
        LLM(str(target), more, dtype="float32")
    model = json.loads((drafter / "tokenizer.json").read_text())["model"]
    first, second, *_ = model["vocab"]
    model["vocab"] |= {first: model["vocab"][second], second: model["vocab"][first]}
    swapped = changed(drafter, tmp_path / "swapped", "tokenizer.json", {"model": model})
    with pytest.raises(CheckpointError, match="differ in 2 tokens"):
        LLM(str(target), swapped, dtype="float32")
    silent = changed(drafter, tmp_path / "silent", "config.json", {})
    for path in Path(silent).glob("*token*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="cannot tell the vocabulary"):
        LLM(str(target), silent, dtype="float32")
    with pytest.raises(ConfigError, match="is no folder here"):
        LLM(str(target), str(tmp_path / "missing"), dtype="float32")
