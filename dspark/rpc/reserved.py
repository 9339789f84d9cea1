"""What Ray reserved for this replica; inside a Ray cluster only."""

from __future__ import annotations

import os
from dataclasses import replace

import ray

from dspark.config import ModelConfig


def with_threads(model: ModelConfig) -> ModelConfig:
    """`model` with as many threads as it says, else as CPUs are reserved, else as there are.

    Beside a GPU, as many as it says.
    Ray sets OMP_NUM_THREADS by the CPUs that it reserves, to 1 if it reserves none.
    """
    if model.device != "cpu":
        return model
    reserved = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0))
    return replace(model, threads=model.threads or reserved or os.cpu_count() or 1)
