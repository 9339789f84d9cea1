"""One HTML file that holds an evaluation, figures included, and loads nothing from elsewhere."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from dspark.errors import ConfigError
from dspark.evaluation.figures import figures
from dspark.evaluation.results import Evaluation

REPORT_FILE = "report.html"
_CAPTIONS = {
    "figure-2-acceptance-by-position": "Conditional acceptance by position (paper, Figure 2): of "
    "the rounds in which all draft tokens before a position were accepted, the share in which it "
    "was, too.",
    "figure-5-threshold-sweep": "Confidence threshold sweep (paper, Figure 5): blocks are cut "
    "before the first draft token whose raw confidence is below the threshold; 0 verifies all.",
    "figure-6-reliability": "Reliability of survival probabilities (paper, Figure 6), before and "
    "after calibration; bars show where the cases lie.",
}


def prepare_folder(folder: Path) -> None:
    """Make it; ConfigError if it cannot be: to be known before a long measurement."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the report's folder {folder}: {error}") from error


def write_report(evaluation: Evaluation, about: Mapping[str, object], folder: Path) -> Path:
    """Write the figures as PNG and REPORT_FILE into `folder`; returns the latter's path."""
    drawn = figures(evaluation)
    page = render(evaluation, about, drawn)
    try:
        for name, png in drawn.items():
            (folder / f"{name}.png").write_bytes(png)
        (folder / REPORT_FILE).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the report to {folder}: {error}") from error
    return folder / REPORT_FILE


def render(evaluation: Evaluation, about: Mapping[str, object], drawn: Mapping[str, bytes]) -> str:
    """The page; every text from outside is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)  # fmt: skip
    source = files("dspark.evaluation").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        arms=evaluation.arms,
        ratios=evaluation.ratios,
        figures=[
            (_CAPTIONS[name], f"data:image/png;base64,{b64encode(png).decode()}")
            for name, png in drawn.items()
        ],
        command=about["command"],
        provenance=json.dumps({k: v for k, v in about.items() if k != "command"}, indent=2),
    )
