"""From reported blocks to tables: when, how much better, and with which epoch."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.traffic import alike, outcomes

from dspark.scheduling.calibration import CalibrationTable
from dspark.scheduling.recalibration import (
    FIRST_BLOCKS,
    FRESH_BLOCKS,
    LEAST_GAIN,
    REFIT_AFTER_S,
    WINDOW,
    Drafter,
    Recalibration,
)

SURE, TRUE = (2.0, 3.0, 2.0), (1.0, 1.0, 1.0)
DRAFTER = Drafter("m", "w")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def fed(count: int = FIRST_BLOCKS, truth: tuple[float, ...] = SURE) -> Recalibration:
    made = Recalibration(Clock())
    made.take(DRAFTER, outcomes(count, truth), 0)
    return made


def settled(one: Recalibration) -> CalibrationTable | None:
    sample = one.due(DRAFTER)
    assert sample is not None
    return one.settle(sample.refit())


def test_wrong_confidences_bring_a_table_that_mends_them() -> None:
    one = fed(WINDOW)
    assert one.table(DRAFTER) is None
    table = settled(one)
    assert table is not None
    assert one.table(DRAFTER) == table
    assert (table.epoch, table.drafter_fingerprint, table.block_size) == (1, "w", 3)
    assert table.blocks == WINDOW // 2
    assert table.scales.sampled.temperatures == pytest.approx(SURE, rel=0.3)
    assert table.scales.greedy == alike((1.0,) * 3).greedy, "nothing was told of such requests"
    (status,) = one.statuses()
    assert status.raw_error > 0.05
    assert status.error < 0.025
    assert (status.table, status.blocks, status.misfits) == (table, WINDOW, 0)


@pytest.mark.parametrize("seed", range(5))
def test_true_confidences_are_left_alone(seed: int) -> None:
    one = Recalibration(Clock())
    one.take(DRAFTER, outcomes(FIRST_BLOCKS, TRUE, seed=seed), 0)
    assert settled(one) is None


def test_scales_that_verifiers_have_already_are_not_published_again() -> None:
    one = Recalibration(Clock())
    one.take(DRAFTER, outcomes(WINDOW, SURE, in_use=alike(SURE)), 0)
    assert settled(one) is None
    (status,) = one.statuses()
    assert status.raw_error > 0.05 > 0.025 > status.error


def test_each_kind_of_request_has_a_scale_of_its_own() -> None:
    one = Recalibration(Clock())
    timid = (0.5, 0.4, 0.5)
    one.take(DRAFTER, outcomes(WINDOW // 2, SURE), 0)
    one.take(DRAFTER, outcomes(WINDOW // 2, timid, seed=1, greedy=True), 0)
    table = settled(one)
    assert table is not None
    assert table.scales.sampled.temperatures == pytest.approx(SURE, rel=0.3)
    assert table.scales.greedy.temperatures == pytest.approx(timid, rel=0.3)
    assert one.statuses()[0].error < 0.03


def test_it_waits_for_evidence_then_for_fresh_blocks_and_for_time() -> None:
    clock = Clock()
    one = Recalibration(clock)
    one.take(DRAFTER, outcomes(FIRST_BLOCKS - 1, SURE), 0)
    assert one.due(DRAFTER) is None
    one.take(DRAFTER, outcomes(1, SURE), 0)
    sample = one.due(DRAFTER)
    assert sample is not None
    clock.now += 2 * REFIT_AFTER_S
    one.take(DRAFTER, outcomes(FRESH_BLOCKS, SURE), 0)
    assert one.due(DRAFTER) is None  # one is under way
    one.settle(sample.refit())
    assert one.due(DRAFTER) is not None
    one.settle(sample.refit())
    clock.now += REFIT_AFTER_S
    one.take(DRAFTER, outcomes(FRESH_BLOCKS - 1, SURE), 0)
    assert one.due(DRAFTER) is None
    one.take(DRAFTER, outcomes(1, SURE), 0)
    clock.now -= 1.0
    assert one.due(DRAFTER) is None
    clock.now += 1.0
    assert one.due(DRAFTER) is not None
    assert one.due(Drafter("m", "unknown")) is None


def test_a_fit_that_came_to_nothing_does_not_keep_others_away() -> None:
    clock = Clock()
    one = Recalibration(clock)
    one.take(DRAFTER, outcomes(FIRST_BLOCKS, SURE), 0)
    assert one.due(DRAFTER) is not None
    one.give_up(DRAFTER)
    assert one.due(DRAFTER) is None, "nothing has changed"
    clock.now += 2 * REFIT_AFTER_S
    one.take(DRAFTER, outcomes(FRESH_BLOCKS, SURE), 0)
    assert one.due(DRAFTER) is not None
    one.give_up(Drafter("m", "unknown"))


def test_a_table_is_replaced_when_the_traffic_changes_and_not_before() -> None:
    clock = Clock()
    one = Recalibration(clock)
    epochs = []
    for truth in (SURE, SURE, SURE, (0.5, 0.5, 0.5)):
        clock.now += REFIT_AFTER_S
        one.take(DRAFTER, outcomes(WINDOW, truth, seed=len(epochs)), 0)
        table = settled(one)
        assert table is not None
        epochs.append(table.epoch)
    assert epochs == [1, 1, 1, 2]


def test_a_fit_that_gains_too_little_is_dropped() -> None:
    one = fed()
    sample = one.due(DRAFTER)
    assert sample is not None
    refit = sample.refit()
    assert one.settle(replace(refit, error=refit.error_in_use - 0.9 * LEAST_GAIN)) is None


def test_epochs_rise_over_all_that_was_ever_heard_of() -> None:
    one = fed()
    one.restore(DRAFTER, CalibrationTable(alike(TRUE), 3, "w", 1000, epoch=5))
    table = settled(one)
    assert table is not None
    assert table.epoch == 6
    lost = Recalibration(Clock())  # the store, too
    lost.take(DRAFTER, outcomes(FIRST_BLOCKS, SURE, in_use=alike(TRUE)), 9)
    table = settled(lost)
    assert table is not None
    assert table.epoch == 10


def test_what_verifiers_use_is_improved_on_even_if_the_store_had_kept_less() -> None:
    one = Recalibration(Clock())
    one.restore(DRAFTER, CalibrationTable(alike(TRUE), 3, "w", 1000, epoch=5))
    one.take(DRAFTER, outcomes(WINDOW, SURE, in_use=alike(SURE)), 7)
    sample = one.due(DRAFTER)
    assert sample is not None
    assert sample.in_use == alike(SURE)


def test_blocks_of_another_size_are_left_out_and_counted() -> None:
    one = fed()
    one.take(DRAFTER, outcomes(10, (1.0,) * 4), 0)
    restored = Recalibration(Clock())
    restored.restore(DRAFTER, CalibrationTable(alike((1.0,) * 4), 4, "w", 1000))
    restored.take(DRAFTER, outcomes(FIRST_BLOCKS, SURE), 0)
    assert [s.misfits for s in (*one.statuses(), *restored.statuses())] == [1, 1]
    assert restored.due(DRAFTER) is None


def test_the_drafters_that_are_remembered_are_bounded() -> None:
    one = Recalibration(Clock())
    for i in range(100):
        one.take(Drafter("m", str(i)), outcomes(1, SURE), 0)
    assert [s.drafter.fingerprint for s in one.statuses()] == [str(i) for i in range(68, 100)]
