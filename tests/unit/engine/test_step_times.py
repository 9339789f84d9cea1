"""Step times are measured once for each kind of verifier, kept, checked, and refused elsewhere."""

from __future__ import annotations

import itertools
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import hf_model, save_models, tiny_engine, tiny_target

from dspark.config import EngineConfig, ModelConfig
from dspark.engine import profiling
from dspark.engine import step_times as module
from dspark.engine.assembly import load_target, make_verifier
from dspark.engine.profiling import Grid, profile_steps
from dspark.engine.step_times import StepTimeFiles, fingerprint, step_times
from dspark.models.graphs import GATHERING
from dspark.models.target import TargetModel
from dspark.scheduling.step_table import StepTimeTable

TARGET = tiny_target()
GRID = Grid((1, 2), (1, 3), (16, 64))
TABLE = StepTimeTable((1, 2), (1, 2), (8,), (((1.0, 2.0), (3.0, 4.0)),), fingerprint="f")


class Starts:
    """Verifiers of one target that start after each other, and what each had to measure."""

    def __init__(self, folder: Path) -> None:
        self.files = StepTimeFiles(folder)
        self.measured = 0
        self._kv = tiny_engine(TARGET).kv

    def start(self, target: TargetModel = TARGET, grid: Grid = GRID) -> StepTimeTable:
        return step_times(target, self._kv, grid, [self.files], self._progress)

    def _progress(self, done: int, total: int) -> None:
        self.measured += done == total


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Starts:
    monkeypatch.setattr(module, "_FAR_OFF", 1e6)  # however busy this machine is
    return Starts(tmp_path)


def test_a_second_start_uses_what_the_first_measured(starts: Starts) -> None:
    first, second = starts.start(), starts.start()
    assert starts.measured == 1
    assert (second.fingerprint, second.contexts) == (first.fingerprint, (16, 64))
    factor = second.ms(1, 1, 16) / first.ms(1, 1, 16)  # the machine's speed may be another
    assert second.ms(2, 6, 64) == pytest.approx(factor * first.ms(2, 6, 64))


def test_another_kind_of_verifier_measures_for_itself(starts: Starts) -> None:
    tables = [
        starts.start(),
        starts.start(tiny_target(num_hidden_layers=4)),
        starts.start(TargetModel(hf_model(), padded=True)),
        starts.start(grid=Grid((1, 4), (1, 3), (16, 64))),
    ]
    assert starts.measured == len({table.fingerprint for table in tables}) == len(tables)


def test_threads_taps_and_the_engines_version_are_in_the_fingerprint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {fingerprint(TARGET, GRID), fingerprint(TargetModel(hf_model()), GRID)}
    with monkeypatch.context() as patch:
        patch.setattr(TARGET, "batch_invariant", True)  # other products
        names.add(fingerprint(TARGET, GRID))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    names.add(fingerprint(TARGET, GRID))
    monkeypatch.setattr(module, "STEP_VERSION", 1000)
    names.add(fingerprint(TARGET, GRID))
    monkeypatch.setattr(TargetModel, "tensor_parallel", 2)
    names.add(fingerprint(TARGET, GRID))
    assert len(names) == 6


def test_other_weights_of_the_same_shape_take_as_long() -> None:
    assert fingerprint(tiny_target(seed=1), GRID) == fingerprint(TARGET, GRID)


def test_a_table_of_another_speed_is_measured_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    starts = Starts(tmp_path)
    slow = starts.start().scaled(1000.0)
    starts.files.put(slow)
    assert starts.start().ms(1, 1, 16) < 0.1 * slow.ms(1, 1, 16)
    assert starts.measured == 2
    assert "measuring anew" in caplog.text


def test_a_table_of_another_grid_is_refused(
    starts: Starts, caplog: pytest.LogCaptureFixture
) -> None:
    """It came from elsewhere, and measuring by it may take more memory than there is."""
    name = starts.start().fingerprint
    starts.files.put(replace(TABLE, requests=(1, 1 << 24), fingerprint=name))
    assert starts.start().requests == GRID.requests
    assert starts.measured == 2
    assert "refused kept step times" in caplog.text
    few = StepTimeTable((1, 4), (1, 2), (8,), TABLE.step_ms)
    assert Grid((1, 4, 8), (1, 2), (8,)).covers(few), "a slow machine leaves the largest out"


def test_a_table_that_is_kept_somewhere_is_kept_everywhere_from_then_on(
    starts: Starts, tmp_path: Path
) -> None:
    near, far = StepTimeFiles(tmp_path / "near"), starts.files
    table = starts.start()
    step_times(TARGET, tiny_engine(TARGET).kv, GRID, [near, far])
    assert near.get(table.fingerprint) == table
    further = StepTimeFiles(tmp_path / "further")
    step_times(TARGET, tiny_engine(TARGET).kv, GRID, [near, further])
    assert further.get(table.fingerprint) == table
    both = [StepTimeFiles(tmp_path / "a"), StepTimeFiles(tmp_path / "b")]
    step_times(TARGET, tiny_engine(TARGET).kv, GRID, both)
    assert [store.get(table.fingerprint) is not None for store in both] == [True, True]


def test_a_table_survives_in_a_file(tmp_path: Path) -> None:
    files = StepTimeFiles(tmp_path / "not" / "there")
    assert files.get("f") is None
    files.put(TABLE)
    files.put(TABLE.scaled(2.0))
    assert files.get("f") == TABLE.scaled(2.0)
    assert os.listdir(tmp_path / "not" / "there") == ["f.json"]


@pytest.mark.parametrize(
    "damaged", [b"", b"\xff", b"{}", TABLE.to_json().encode()[:-9], b" " * (1 << 20)]
)
def test_a_damaged_file_is_refused(
    damaged: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "f.json").write_bytes(damaged)
    assert StepTimeFiles(tmp_path).get("f") is None
    assert "of no use" in caplog.text


def test_a_file_of_another_fingerprint_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "g.json").write_text(TABLE.to_json())
    assert StepTimeFiles(tmp_path).get("g") is None
    assert "measured on 'f', not on 'g'" in caplog.text


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    StepTimeFiles(tmp_path / "file").put(TABLE)
    assert "cannot be kept" in caplog.text


def test_a_verifier_starts_with_what_an_earlier_one_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_FAR_OFF", 1e6)
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
    target, _ = save_models(tmp_path)
    loaded = load_target(ModelConfig(str(target), "prompt-lookup", dtype="float32"))
    progress: list[Any] = []
    config = EngineConfig(max_requests=2, cache_tokens=256)
    first = make_verifier(loaded, config, None, lambda *_: progress.append(1))
    assert first.table is not None
    measured = len(progress)
    with caplog.at_level(logging.INFO):
        again = make_verifier(loaded, config, None, lambda *_: progress.append(1))
    assert again.table is not None
    assert len(progress) == measured > 0
    assert again.table.fingerprint == first.table.fingerprint
    assert "those of an earlier start" in caplog.text


def test_a_grid_ends_where_the_engine_does() -> None:
    grid = Grid.of(TARGET, block_size=4, max_requests=20, cache_tokens=300)
    assert grid == Grid((1, 2, 4, 8, 16, 20), (1, 2, 3, 4, 5), (64, 295))
    grid = Grid.of(TARGET, block_size=0, max_requests=1, cache_tokens=16)
    assert grid == Grid((1, 2), (1, 2), (14,))
    grid = Grid.of(TARGET, block_size=4, max_requests=4, cache_tokens=1 << 20)
    assert grid.contexts == (64, TARGET.max_positions - 5)


def test_padded_steps_are_measured_at_their_sizes() -> None:
    target = TargetModel(hf_model(), padded=True)
    grid = Grid.of(target, block_size=4, max_requests=3, cache_tokens=256)
    assert grid == Grid((1, 2, 4), (1, 2, 4, 8), (64, 248))
    table = profile_steps(target, tiny_engine(target).kv, grid)
    assert table.padded == GATHERING.sizes(16)
    assert {r * q for r, q, _ in grid.cells} <= set(table.padded)
    assert table.ms(1, 5, 64) == table.ms(1, 8, 64)
    assert not profile_steps(TARGET, tiny_engine(TARGET).kv, GRID).padded


def test_a_machine_that_doubles_its_speed_for_a_while_bends_no_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fast for so many steps, then slow for as many, in which a pass over the cells never fits."""
    grid = Grid((1, 2, 4), (1, 2, 4, 8), (16, 64))
    steps = itertools.count()

    def step_ms(target: object, kv: object, cell: tuple[int, int, int]) -> float:
        requests, rows, context = cell
        return (10.0 + requests * rows + 0.01 * context) * (1 + next(steps) // 23 % 2)

    monkeypatch.setattr(profiling, "_step_ms", step_ms)
    table = profile_steps(TARGET, tiny_engine(TARGET).kv, grid)
    for requests, rows, context in grid.cells:
        measured = table.ms(requests, requests * rows, context) / table.ms(
            requests, requests, context
        )
        true = (10.0 + requests * rows + 0.01 * context) / (10.0 + requests + 0.01 * context)
        assert measured == pytest.approx(true, rel=0.01)


def test_more_requests_than_the_cache_has_room_for_can_be_measured() -> None:
    kv = tiny_engine(TARGET, cache_tokens=64).kv
    assert profile_steps(TARGET, kv, Grid((1, 8), (1, 2), (16, 60))).requests == (1, 8)
