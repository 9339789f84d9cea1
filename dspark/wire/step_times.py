"""Step-time tables between verifiers and the scheduler."""

from __future__ import annotations

from math import prod

import numpy as np

from dspark.errors import ProtocolError, StepTableError
from dspark.pb import scheduler_pb2
from dspark.scheduling.step_table import StepTimeTable


def step_times_to_pb(table: StepTimeTable) -> scheduler_pb2.StepTimeTable:
    """A table as a message."""
    return scheduler_pb2.StepTimeTable(
        fingerprint=table.fingerprint,
        requests=table.requests,
        rows=table.rows,
        contexts=table.contexts,
        step_ms=np.ravel(table.step_ms),
        padded=table.padded,
    )


def step_times_from_pb(message: scheduler_pb2.StepTimeTable) -> StepTimeTable:
    """A table; ProtocolError if it breaks the contract."""
    shape = len(message.contexts), len(message.requests), len(message.rows)
    if len(message.step_ms) != prod(shape):
        raise ProtocolError(
            f"a step-time table of {' × '.join(map(str, shape))} needs as many times; got "
            f"{len(message.step_ms)}"
        )
    grid = np.reshape(message.step_ms, shape).tolist()
    try:
        return StepTimeTable(
            requests=tuple(message.requests),
            rows=tuple(message.rows),
            contexts=tuple(message.contexts),
            step_ms=tuple(tuple(map(tuple, plane)) for plane in grid),
            padded=tuple(message.padded),
            fingerprint=message.fingerprint,
        )
    except StepTableError as error:
        raise ProtocolError(str(error)) from error
