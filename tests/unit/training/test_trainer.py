"""Training learns, survives a kill, and says what it cannot go on with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import drafter_of, target_of
from helpers.tiny import TAPS, hf_model, tiny_drafter
from helpers.training import counting

from dspark.errors import ConfigError
from dspark.models.sequential_head import MarkovHead, sequential_head
from dspark.models.target import TargetModel
from dspark.training.bigrams import bigram_factors, common_tokens
from dspark.training.text import Conversation
from dspark.training.trainer import STATE_FILE, Measures, TrainConfig, Trainer

CONFIG = TrainConfig(
    steps=6,
    conversations_per_step=2,
    updates_per_step=2,
    anchors_per_update=8,
    max_tokens=48,
    learning_rate=1e-2,
    markov_lr_factor=5.0,
    save_every=3,
    evaluate_every=100,
)


KINDS: dict[str, dict[str, Any]] = {
    "markov": {},
    "gated": {"head": "gated"},
    "rnn": {"head": "rnn"},
    "none, fill-in": {"rank": 0, "from_anchor": False},
    "no confidence": {"confidence": False},
}


def trainer(folder: Path, config: TrainConfig = CONFIG, **kind: Any) -> Trainer:
    target = TargetModel(hf_model(), TAPS)
    shape = replace(tiny_drafter(target, **kind).config, draft_vocab_size=24)
    return Trainer(target, shape, counting(), config, folder)


def nothing(step: int, loss: float, measures: Measures | None) -> None:
    pass


def test_a_run_goes_on_from_a_drafter_that_is_there(tmp_path: Path) -> None:
    """Its vocabulary and weights, whatever the text would have chosen."""
    first = trainer(tmp_path / "first")
    first.run(nothing)
    first.save_checkpoint(tmp_path / "drafter")
    second = Trainer(
        first.target,
        first.drafter.config,
        counting(60)[::-1],
        CONFIG,
        tmp_path / "second",
        start_from=tmp_path / "drafter",
    )
    assert torch.equal(second.drafter.draft_token_ids, first.drafter.draft_token_ids)
    measured = second.evaluate()
    assert measured.greedy_length == pytest.approx(first.evaluate().greedy_length, abs=0.3)
    assert measured.greedy_length > 1.0 + 2 * (
        trainer(tmp_path / "new").evaluate().greedy_length - 1.0
    )
    second.run(nothing)
    assert second.evaluate().greedy_length >= measured.greedy_length - 0.3


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.run(nothing)

    class KilledError(Exception):
        pass

    def kill(step: int, loss: float, measures: Measures | None) -> None:
        if step == 4:  # one step past the saved state: it must be done again
            raise KilledError

    cut = trainer(tmp_path / "cut")
    with pytest.raises(KilledError):
        cut.run(kill)
    resumed = trainer(tmp_path / "cut")
    assert resumed.step == 3
    resumed.run(nothing)
    for name, tensor in whole.drafter.state_dict().items():
        assert torch.equal(resumed.drafter.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls(kind: str, tmp_path: Path) -> None:
    losses: list[float] = []
    config = replace(CONFIG, steps=80)
    of_kind = trainer(tmp_path, config, **KINDS[kind])
    of_kind.run(lambda step, loss, measures: losses.append(loss))
    assert sum(losses[-5:]) < 0.96 * sum(losses[:5])


@pytest.mark.parametrize("family", ["gemma2", "gemma4", "gemma4, mixed"])
def test_other_families_start_and_learn(family: str, tmp_path: Path) -> None:
    losses: list[float] = []
    shape = replace(drafter_of(family).config, draft_vocab_size=24)
    config = replace(CONFIG, steps=40)
    learner = Trainer(target_of(family), shape, counting(), config, tmp_path)
    learner.run(lambda step, loss, measures: losses.append(loss))
    assert sum(losses[-5:]) < 0.96 * sum(losses[:5])


def test_another_draft_vocabulary_is_not_gone_on_with(tmp_path: Path) -> None:
    trainer(tmp_path).run(nothing)
    state = torch.load(tmp_path / STATE_FILE, weights_only=True)
    state["draft_token_ids"] = state["draft_token_ids"].flip(0)
    torch.save(state, tmp_path / STATE_FILE)
    with pytest.raises(ConfigError, match="draft vocabulary"):
        trainer(tmp_path)


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    target = TargetModel(hf_model(), TAPS)
    with pytest.raises(ConfigError, match="too few"):
        Trainer(target, tiny_drafter(target).config, counting(20), CONFIG, tmp_path)


def test_the_draft_vocabulary_is_the_most_frequent_tokens() -> None:
    text = [Conversation((0,), (5, 5, 5, 2, 2, 9), 1.0)]
    assert common_tokens(text, 2, 16).tolist() == [2, 5]
    assert common_tokens(text, 16, 16).tolist() == list(range(16))


@pytest.mark.parametrize(("kind", "off_by"), [("vanilla", 1e-6), ("gated", 0.02), ("rnn", 0.005)])
def test_every_head_can_begin_as_bigrams(kind: str, off_by: float) -> None:
    """σ(4) lets 98 % through, and tanh(0.1) is 0.3 % less than 0.1."""
    generator = torch.Generator().manual_seed(0)
    w1, w2 = torch.randn(30, 8, generator=generator), torch.randn(24, 8, generator=generator)
    head = sequential_head(kind, 8, vocab_size=30, draft_vocab_size=24, hidden_size=16)
    assert isinstance(head, MarkovHead)
    head.start_from(w1, w2)
    previous = torch.arange(30).view(6, 5)
    hidden = torch.randn(6, 5, 16, generator=generator)
    with torch.no_grad():
        bias = head.bias(head.codes(head.embed(previous), hidden))
    want = w1[previous] @ w2.T
    assert (bias - want).abs().max() < off_by * want.abs().max()


def test_bigram_factors_rank_what_follows() -> None:
    text = counting()
    w1, w2 = bigram_factors(text, torch.arange(30), 32, rank=31)
    table = w1 @ w2.T
    assert table[:30].argmax(-1).tolist() == [(i + 1) % 30 for i in range(30)]


def test_a_state_of_another_version_is_not_gone_on_with(tmp_path: Path) -> None:
    trainer(tmp_path).run(nothing)
    state = torch.load(tmp_path / STATE_FILE, weights_only=True)
    del state["average"]
    torch.save(state, tmp_path / STATE_FILE)
    with pytest.raises(ConfigError, match="another version"):
        trainer(tmp_path)
