"""Where a verifier's step-time table comes from: kept from an earlier start, or measured now.

A table is kept under the fingerprint of all that steps take their time from, in the user's cache
folder and wherever else a start is given. One that is found is checked by a few steps: it takes
over today's speed of the machine, or is measured anew if that is too far from what it was.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch

from dspark import __version__
from dspark.config import cache_folder
from dspark.engine.profiling import Grid, profile_steps, speed_now
from dspark.errors import StepTableError
from dspark.kernels.cpu import operators
from dspark.kernels.cpu.library import cpu_name, instruction_set
from dspark.kernels.dispatch import has_triton
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetModel
from dspark.scheduling.step_table import MAX_TABLE_BYTES, StepTimeTable

log = logging.getLogger(__name__)

# To be raised when what a step does, or how one is measured, changes between two releases.
STEP_VERSION = 4
_FAR_OFF = 1.3  # times as fast or slow as a kept table: other things than speed may have changed


class StepTimeStore(Protocol):
    """Keeps tables between starts. A store that fails says so in the log; it never raises."""

    def get(self, fingerprint: str) -> StepTimeTable | None:
        """The table that was measured on that, if it is kept and whole."""

    def put(self, table: StepTimeTable) -> None:
        """Keep a table, replacing any."""


class StepTimeFiles:
    """A file for each table, in one folder."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder`: step-times in the user's cache, unless told otherwise."""
        self._folder = cache_folder() / "step-times" if folder is None else folder

    def get(self, fingerprint: str) -> StepTimeTable | None:
        """See StepTimeStore."""
        path = self._path(fingerprint)
        try:
            with path.open("rb") as file:
                table = StepTimeTable.from_json(file.read(MAX_TABLE_BYTES + 1))
            table.check_fits(fingerprint)
        except FileNotFoundError:
            return None
        except (OSError, StepTableError) as error:
            log.warning("step times in %s are of no use: %s", path, error)
            return None
        return table

    def put(self, table: StepTimeTable) -> None:
        """See StepTimeStore."""
        path = self._path(table.fingerprint)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self._folder, suffix=".partial", delete=False
            ) as partial:
                partial.write(table.to_json() + "\n")
            os.replace(partial.name, path)
        except OSError as error:
            log.warning("step times cannot be kept in %s: %s", path, error)

    def _path(self, fingerprint: str) -> Path:
        return self._folder / f"{fingerprint}.json"


def step_times(
    target: TargetModel,
    kv: PagedKVCache,  # as profile_steps takes it
    grid: Grid,
    stores: Sequence[StepTimeStore],  # the nearest first
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> StepTimeTable:
    """The table of a verifier that is about to start."""
    name = fingerprint(target, grid)
    table = _kept(name, grid, stores)
    if table is not None:
        speed = speed_now(target, kv, table)
        if 1 / _FAR_OFF <= speed <= _FAR_OFF:
            log.info("step times are those of an earlier start, %.2f times as long", speed)
            return table.scaled(speed)
        log.warning("steps take %.2f times as long as is kept: measuring anew", speed)
    table = profile_steps(target, kv, grid, fingerprint=name, on_progress=on_progress)
    for store in stores:
        store.put(table)
    return table


def _kept(name: str, grid: Grid, stores: Sequence[StepTimeStore]) -> StepTimeTable | None:
    """Of the nearest store that has it; all keep it from now on."""
    for store in stores:
        table = store.get(name)
        if table is None:
            continue
        if not grid.covers(table):
            log.warning("refused kept step times: measured at %s, not at %s", table, grid)
            continue
        for other in stores:
            if other is not store:
                other.put(table)
        return table
    return None


def fingerprint(target: TargetModel, grid: Grid) -> str:
    """Names what a table is valid for.

    That is the target's configuration, type, taps and way of running, batch-invariant or not; the
    device by name, with the operators' instruction set and the threads where it is a CPU; torch;
    the engine's version; how many processes share a step; and what was measured, which holds the
    engine's bounds. Not the weights: their values do not change what multiplying by them takes.
    """
    facts = (
        target.config.to_json_string(use_diff=False),
        str(target.dtype),
        target.tap_layer_ids,
        (target.fused, target.padded is not None, target.batch_invariant),
        _device(target.device),
        torch.__version__,
        (__version__, STEP_VERSION),
        target.tensor_parallel,
        grid,
    )
    return sha256(repr(facts).encode()).hexdigest()[:32]


def _device(device: torch.device) -> tuple[object, ...]:
    """A GPU waits for the CPU that launches its work, so that one counts everywhere."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device), torch.version.cuda, has_triton(device)
        return cpu_name(), *gpu
    instructions = instruction_set() if operators.available() else None
    return cpu_name(), device.type, instructions, torch.get_num_threads()
