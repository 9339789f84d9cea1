"""A small training run; as a program, one that says each step it has made."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from helpers.tiny import TAPS, hf_model, save_models, tiny_drafter
from helpers.tokenizer import byte_level

from dspark.models.target import TargetModel
from dspark.training.job import TEXT, TrainJob, run_job
from dspark.training.peers import joined
from dspark.training.text import Conversation, write_conversations
from dspark.training.trainer import TrainConfig

_LENGTH = 24  # tokens of a conversation
_PROMPT = 4
CONFIG = TrainConfig(
    steps=12,
    conversations_per_step=4,
    updates_per_step=1,
    anchors_per_update=4 * (_LENGTH - _PROMPT - 1),  # all that there are
    max_tokens=48,
    learning_rate=1e-2,
    save_every=2,
    evaluate_every=6,
)


def counting(count: int = 60) -> list[Conversation]:
    """Text that counts upwards: what follows is known from the token before."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for _ in range(count):
        start = int(torch.randint(0, 30, (1,), generator=generator))
        tokens = tuple((start + i) % 30 for i in range(_LENGTH))
        out.append(Conversation(tokens[:_PROMPT], tokens[_PROMPT:], 1.0))
    return out


def job(folder: Path, *, logs: bool = False) -> TrainJob:
    """A target, text, and what to train on them: made in `folder`, or found there."""
    out = folder / "out"
    if not out.exists():
        save_models(folder)
        out.mkdir()
        write_conversations(counting(80), out / TEXT)
    shape = tiny_drafter(TargetModel(hf_model(vocab=len(byte_level())), TAPS)).config
    return TrainJob(
        str(folder / "target"), replace(shape, draft_vocab_size=28), CONFIG, out, "cpu", logs
    )


if __name__ == "__main__":
    own = job(Path(sys.argv[1]))
    with joined(own.device):
        run_job(own, lambda step, loss, measures: print(step, flush=True))
