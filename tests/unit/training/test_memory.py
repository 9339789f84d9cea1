"""What training is said to hold is what it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.tiny import hf_model, save_models, tiny_drafter, tiny_target
from helpers.tokenizer import byte_level

from dspark.errors import CheckpointError
from dspark.training.memory import training_memory
from dspark.training.trainer import TrainConfig

CONFIG = TrainConfig(
    conversations_per_step=4, updates_per_step=2, anchors_per_update=16, max_tokens=64
)


def test_weights_and_what_follows_from_them_are_counted(tmp_path: Path) -> None:
    folder, _ = save_models(tmp_path)
    target = hf_model(vocab=len(byte_level()))
    drafter = tiny_drafter(tiny_target(vocab=len(byte_level())))
    parts = training_memory(str(folder), drafter.config, CONFIG).parts
    own = sum(p.numel() for p in drafter.parameters())
    assert parts["drafter: float32 weights"] == parts["drafter: gradients"] == 4 * own
    assert parts["drafter: AdamW's moments"] == 8 * own
    assert parts["target: weights, bf16"] == 2 * sum(p.numel() for p in target.parameters())
    without = training_memory(str(folder), drafter.config, replace(CONFIG, average_decay=0.0))
    assert without.parts["drafter: their average"] == 0


def test_it_grows_with_the_work_of_a_step_and_not_with_their_number(tmp_path: Path) -> None:
    folder, _ = save_models(tmp_path)
    shape = tiny_drafter(tiny_target(vocab=len(byte_level()))).config

    def of(workers: int = 1, **changes: int) -> dict[str, int]:
        return training_memory(str(folder), shape, replace(CONFIG, **changes), workers).parts

    assert of(steps=10) == of(steps=10_000_000)
    kept, law = "drafter: kept for backward", "captured: the target's law"
    assert of(anchors_per_update=32)[kept] > 1.5 * of()[kept]
    assert of(anchors_per_update=32)[law] > of()[law]
    assert of(workers=2)[kept] < 0.7 * of()[kept]


def test_a_target_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        training_memory(
            str(tmp_path / "nowhere"), tiny_drafter(tiny_target()).config, TrainConfig()
        )
