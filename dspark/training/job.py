"""One training run, as one worker does it: the same whether it is alone or one of many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dspark.models.drafter import DrafterConfig
from dspark.models.target import TargetModel
from dspark.training.logs import TrainLog
from dspark.training.text import read_conversations
from dspark.training.trainer import Measures, TrainConfig, Trainer

CHECKPOINT = "checkpoint"
TEXT = "text.jsonl"
_LOGS = "logs"

OnStep = Callable[[int, float, Measures | None], None]  # step, loss, measures if it was evaluated


@dataclass(frozen=True, slots=True)
class TrainJob:
    """What to train on what. All workers reach `out`."""

    target: str  # folder or Hugging Face id
    shape: DrafterConfig
    config: TrainConfig
    out: Path  # text, state, logs and checkpoint
    device: str
    logs: bool  # for TensorBoard; needs the extra `train`
    start_from: Path | None = None  # a drafter of this shape whose weights to go on from


def run_job(job: TrainJob, on_step: OnStep) -> None:
    """Train to the end, from where an earlier run was cut, if one was.

    A checkpoint is written after each evaluation. ConfigError or CheckpointError where the job
    cannot be done.
    """
    target = TargetModel.load(
        job.target, device=job.device, tap_layer_ids=job.shape.target_layer_ids
    )
    text = read_conversations(job.out / TEXT)
    trainer = Trainer(target, job.shape, text, job.config, job.out, job.start_from)
    log = TrainLog(job.out / _LOGS, trainer.step) if job.logs and trainer.peers.first else None

    def step(number: int, loss: float, measures: Measures | None) -> None:
        if measures is not None:
            trainer.save_checkpoint(job.out / CHECKPOINT)
        if log is not None:
            log.write(number, loss, trainer.learning_rate, measures)
        on_step(number, loss, measures)

    trainer.run(step)
    if log is not None:
        log.close()
