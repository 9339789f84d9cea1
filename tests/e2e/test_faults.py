"""The fault drill of benchmarks/faults.py, in short: no request fails, whatever does."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.fault_drill import running_drill

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_no_fault_of_one_part_fails_a_request(tmp_path: Path) -> None:
    with running_drill(tmp_path, print, clients=4, steady_s=1.0, lease_s=2.0) as drill:
        outcomes = [
            drill.kill_verifier(),
            drill.hang_drafter(4.0),
            drill.partition("verifier", 4.0),
            drill.kill_scheduler(),
            drill.restart_redis(2.0, keep=False),
        ]
    assert [ended.failure for ended in drill.load.ended if ended.failure] == []
    for outcome in outcomes:
        assert outcome.requests > 0, outcome
        assert outcome.recovered, outcome
        assert outcome.conclusive, f"INCONCLUSIVE: {outcome}"
