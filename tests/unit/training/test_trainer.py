"""Training learns, survives a kill, and says what it cannot go on with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny import TAPS, hf_model, tiny_drafter

from dspark.errors import ConfigError
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


def conversations(count: int = 60) -> list[Conversation]:
    """Text that counts upwards: what follows is known from the token before."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for _ in range(count):
        start = int(torch.randint(0, 30, (1,), generator=generator))
        tokens = tuple((start + i) % 30 for i in range(24))
        out.append(Conversation(tokens[:4], tokens[4:], 1.0))
    return out


def trainer(folder: Path, config: TrainConfig = CONFIG) -> Trainer:
    target = TargetModel(hf_model(), TAPS)
    shape = replace(tiny_drafter(target).config, draft_vocab_size=24)
    return Trainer(target, shape, conversations(), config, folder)


def nothing(step: int, loss: float, measures: Measures | None) -> None:
    pass


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


def test_the_loss_falls(tmp_path: Path) -> None:
    losses: list[float] = []
    config = replace(CONFIG, steps=40)
    trainer(tmp_path, config).run(lambda step, loss, measures: losses.append(loss))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


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
        Trainer(target, tiny_drafter(target).config, conversations(20), CONFIG, tmp_path)


def test_the_draft_vocabulary_is_the_most_frequent_tokens() -> None:
    text = [Conversation((0,), (5, 5, 5, 2, 2, 9), 1.0)]
    assert common_tokens(text, 2, 16).tolist() == [2, 5]
    assert common_tokens(text, 16, 16).tolist() == list(range(16))


def test_bigram_factors_rank_what_follows() -> None:
    text = conversations()
    w1, w2 = bigram_factors(text, torch.arange(30), 32, rank=31)
    table = w1 @ w2.T
    assert table[:30].argmax(-1).tolist() == [(i + 1) % 30 for i in range(30)]
