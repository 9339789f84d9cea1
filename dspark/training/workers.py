"""A training run by many workers, data parallel, which Ray Train starts, joins and restarts.

A worker that dies takes the others down; all of them begin again from the last state that was
saved, as a run that was cut does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dspark.errors import ConfigError
from dspark.training.job import TrainJob, run_job
from dspark.training.trainer import Measures

_RESTARTS = 3


def run_on_workers(job: TrainJob, workers: int) -> None:
    """Train on so many workers of the Ray cluster, or of this machine where there is none.

    ConfigError if the extra `train` is missing or the workers fail more often than they may.
    """
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise ConfigError("--workers needs Ray Train: pip install 'dspark-serve[train]'") from error
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=job.device != "cpu"),
        run_config=RunConfig(
            name="dspark-train",
            storage_path=str((job.out / "ray").resolve()),
            failure_config=FailureConfig(max_failures=_RESTARTS),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise ConfigError(f"training failed on its workers: {error}") from error


def _work(settings: dict[str, Any]) -> None:
    from ray import train
    from ray.train.torch import get_device

    first = train.get_context().get_world_rank() == 0

    def report(step: int, loss: float, measures: Measures | None) -> None:
        if measures is None:
            return
        if first:
            print(measures.summary(step), flush=True)
        train.report({"step": step, "loss": loss, "greedy_length": measures.greedy_length})

    job: TrainJob = settings["job"]
    run_job(replace(job, device=str(get_device())), report)
