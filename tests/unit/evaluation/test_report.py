"""The report is one file that loads nothing, and what comes from outside stays text."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dspark.errors import ConfigError
from dspark.evaluation.held_out import Fit, calibrated_by
from dspark.evaluation.measuring import Arm, measure
from dspark.evaluation.report import prepare_folder, write_report
from dspark.evaluation.results import Evaluation
from dspark.evaluation.rounds import Rounds
from dspark.types import Scale

NASTY = "<script>alert(1)</script> $x^{$ \"'& ü"


def evaluation(name: str, count: int) -> Evaluation:
    accepted = np.arange(count) % 3
    files = {
        file: Rounds(
            2,
            np.arange(count) % 2,
            np.full(count, 2),
            accepted,
            accepted + 1,
            np.full((count, 2), 0.5, dtype=np.float32),
        )
        for file in (name, "other")
    }
    fitted = calibrated_by(Fit(Scale((1.5, 1.0)), (count, count), count), files)
    arm = Arm(name, name, "f0", "rejection", "confidence head", 2, 2, name, files, fitted)
    return measure([arm, replace(arm, name="second")] if count else [arm])


@pytest.mark.parametrize("count", [0, 12])
def test_the_report_is_whole_and_closed(tmp_path: Path, count: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = write_report(
            evaluation(NASTY, count), {"command": f"dspark eval {NASTY}", "cpu": NASTY}, tmp_path
        )
    html = page.read_text(encoding="utf-8")
    for png in tmp_path.glob("*.png"):
        assert png.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.glob("*.png"))) == html.count('src="data:image/png;base64,') == 3
    assert not re.search(r'(src|href)\s*=\s*"(?!data:)|url\(|@import|<script|<link', html)
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 6
    assert "mean of files" in html


def test_a_folder_that_cannot_be_made_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="taken"):
        prepare_folder(tmp_path / "taken")
