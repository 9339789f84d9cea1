"""`dspark eval` in the real loop: JSON, report, comparison and a calibration that is kept."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import save_models
from typer.testing import CliRunner

from dspark.cli.main import app
from dspark.models.builtin import shipped_drafter
from dspark.models.checkpoint import fingerprint, read_calibration

runner = CliRunner()
PROMPTS = ["Why do leaves fall?", "Count from one to ten.", "Write a short poem about rain."]


def prompt_file(path: Path, prompts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


def test_the_shipped_drafter_is_measured_in_both_modes(tmp_path: Path) -> None:
    prompts = prompt_file(tmp_path / "mine.jsonl", PROMPTS)
    report = tmp_path / "report"
    result = runner.invoke(
        app,
        [
            "eval", "--prompts", str(prompts), "--tokens", "16", "--temperature", "1",
            "--mode", "rejection", "--mode", "coupled", "--report", str(report), "--json",
        ],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {"machine", "commit", "versions", "command", "arms", "ratios"} == found.keys()
    assert found["command"].startswith(f"dspark eval --prompts {prompts}")
    rejection, coupled = found["arms"]
    assert (rejection["mode"], coupled["mode"]) == ("rejection", "coupled")
    folder = shipped_drafter("smollm2-135m")
    assert folder is not None
    assert rejection["fingerprint"] == fingerprint(folder)
    for arm in (rejection, coupled):
        checked(arm["files"]["mine"], arm["block_size"])
        assert "cross-fitting" in arm["calibration"]["source"]
        assert len(arm["calibration"]["fits"]) == 2
    (ratio,) = found["ratios"]
    lengths = [arm["macro"]["accepted_length"]["value"] for arm in found["arms"]]
    assert ratio["macro"]["value"] == pytest.approx(lengths[1] / lengths[0])
    html = (report / "report.html").read_text(encoding="utf-8")
    assert html.count('src="data:image/png;base64,') == 3 == len(list(report.glob("*.png")))
    for figure in ("Figure 2", "Figure 5", "Figure 6"):
        assert figure in html
    assert not re.search(r"https?://", html)


def checked(result: dict[str, Any], block_size: int) -> None:
    """The JSON of one file agrees with itself, and drafting really happened."""
    acceptance = result["acceptance"]
    assert result["prompts"] == len(PROMPTS)
    assert 0 < result["accepted"] < result["verified"] <= result["rounds"] * block_size
    length = acceptance["accepted_length"]
    assert length["value"] == pytest.approx(result["tokens"] / result["rounds"])
    assert length["low"] <= length["value"] <= length["high"]
    assert length["n"] == result["rounds"]
    assert len(acceptance["conditional"]) == block_size
    product = 1.0
    for conditional, survival in zip(
        acceptance["conditional"], acceptance["survival"], strict=True
    ):
        if conditional["value"] is not None:
            product *= conditional["value"]
            assert survival["value"] == pytest.approx(product)
    everything = result["threshold_sweep"][0]
    assert everything["threshold"] == 0
    assert everything["acceptance"]["value"] == pytest.approx(
        result["accepted"] / result["verified"]
    )
    whole = result["scores"][-1]
    assert whole["position"] == 0
    assert whole["raw"]["ece"]["n"] == result["verified"]
    assert sum(b["observed"]["n"] for b in result["reliability_raw"]) == result["verified"]


def test_a_calibration_is_fitted_on_its_own_prompts_and_kept(
    tiny: tuple[Path, Path], tmp_path: Path
) -> None:
    target, shipped = tiny
    drafter = tmp_path / "mine"
    shutil.copytree(shipped, drafter)
    prompts = prompt_file(tmp_path / "p.jsonl", ["hello", "answer"])
    others = prompt_file(tmp_path / "c.jsonl", [f"quick brown fox {i}" for i in range(24)])
    common = ["eval", "--prompts", str(prompts), "--target", str(target), "--dtype", "float32"]
    common += ["--drafter", str(drafter), "--compare", str(shipped), "--tokens", "40"]

    refused = runner.invoke(app, [*common, "--save-calibration"])
    assert refused.exit_code == 1
    assert "--calibrate-on" in refused.stderr
    shared = runner.invoke(app, [*common, "--calibrate-on", str(prompts)])
    assert shared.exit_code == 1
    assert "calibrate on others" in shared.stderr
    assert read_calibration(drafter, 4) is None

    fitting = [*common, "--calibrate-on", str(others), "--save-calibration"]
    few = runner.invoke(app, [*fitting, "--tokens", "4"])
    assert few.exit_code == 1
    assert "more prompts" in few.stderr.replace("\n", " ")
    assert read_calibration(drafter, 4) is None

    result = runner.invoke(app, fitting)
    assert result.exit_code == 0, result.output + result.stderr
    table = read_calibration(drafter, 4)
    assert table is not None
    assert table.blocks >= 512
    assert read_calibration(shipped, 4) is None  # only the drafter's that was evaluated
    assert "mine" in result.output


def test_a_report_without_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    prompts = prompt_file(tmp_path / "p.jsonl", PROMPTS)
    report = tmp_path / "report"
    result = runner.invoke(app, ["eval", "--prompts", str(prompts), "--report", str(report)])
    assert result.exit_code == 1
    assert "dspark-serve[bench]" in result.stderr
    assert not report.exists()
