"""The paper's Figures 2, 5 and 6 for the drafters of an evaluation, as PNG; needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from dspark.evaluation.bootstrap import Estimate
from dspark.evaluation.plots import require_matplotlib
from dspark.evaluation.results import ArmResult, Bin, Evaluation, FileResult

_PANEL = (4.6, 3.6)  # inches
_MEAN = "mean of files"


def figures(evaluation: Evaluation) -> dict[str, bytes]:
    """PNGs by name."""
    return {
        "figure-2-acceptance-by-position": _by_position(evaluation),
        "figure-5-threshold-sweep": _sweeps(evaluation),
        "figure-6-reliability": _reliability(evaluation),
    }


def _by_position(evaluation: Evaluation) -> bytes:
    files = list(evaluation.arms[0].files)
    titles = [*files, _MEAN] if len(files) > 1 else files
    figure, panels = _panels(1, len(titles))
    for axes, title in zip(panels[0], titles, strict=True):
        for number, arm in enumerate(evaluation.arms):
            found = arm.macro if title == _MEAN else arm.files[title].acceptance
            shift = 0.08 * (number - (len(evaluation.arms) - 1) / 2)  # intervals side by side
            positions = np.arange(1, len(found.conditional) + 1) + shift
            _marked(axes, positions, found.conditional, label=_plain(arm.name))
        axes.set(title=_plain(title), xlabel="position in the block", ylim=(0, 1.02))
        axes.set_ylabel("accepted, of those whose prefix was")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize="small")
    return _png(figure)


def _sweeps(evaluation: Evaluation) -> bytes:
    figure, panels = _panels(len(evaluation.arms), len(evaluation.arms[0].files))
    for row, arm in zip(panels, evaluation.arms, strict=True):
        for axes, (name, result) in zip(row, arm.files.items(), strict=True):
            named = _sweep(axes, result)
            axes.set_title(_title(arm, name, evaluation))
    figure.legend(handles=named, loc="outside lower center", ncols=len(named), fontsize="small")
    return _png(figure)


def _sweep(axes: Any, result: FileResult) -> list[Any]:
    """Returns what a legend is to name."""
    points = result.threshold_sweep
    places = np.arange(len(points))
    kept, accepted = _values([p.kept for p in points]), _values([p.accepted for p in points])
    stood = axes.bar(places, accepted, color="C0", label="accepted")
    fell = axes.bar(places, kept - accepted, bottom=accepted, color="white", edgecolor="C0",
             hatch="///", label="refused")  # fmt: skip
    axes.set_xticks(places, [f"{p.threshold:g}" for p in points], rotation=60)
    axes.set(xlabel="confidence threshold", ylabel="draft tokens verified a round")
    rate = axes.twinx()
    line = _marked(
        rate, places, [p.acceptance for p in points], color="C1", label="acceptance rate"
    )
    rate.set(ylim=(0, 1.02), ylabel="acceptance rate")
    return [stood, fell, line]


def _reliability(evaluation: Evaluation) -> bytes:
    figure, panels = _panels(len(evaluation.arms), len(evaluation.arms[0].files))
    for row, arm in zip(panels, evaluation.arms, strict=True):
        for axes, (name, result) in zip(row, arm.files.items(), strict=True):
            axes.plot([0, 1], [0, 1], "--", color="0.6", linewidth=1)
            whole = result.scores[-1]
            for bins, label, color, scores in (
                (result.reliability_raw, "raw", "C0", whole.raw),
                (result.reliability_calibrated, "calibrated", "C1", whole.calibrated),
            ):
                _diagram(axes, bins, f"{label}, ECE {_told(scores.ece)}", color)
            axes.set(title=_title(arm, name, evaluation), xlim=(0, 1), ylim=(0, 1))
            axes.set(xlabel="survival probability", ylabel="share accepted; cases (bars)")
            axes.legend(fontsize="small", loc="upper left")
    return _png(figure)


def _diagram(axes: Any, bins: Sequence[Bin], label: str, color: str) -> None:
    filled = [b for b in bins if b.predicted is not None]
    for b in filled:
        axes.bar(b.low, b.share, width=b.high - b.low, align="edge", color=color, alpha=0.15)
    _marked(axes, [b.predicted for b in filled], [b.observed for b in filled],
            color=color, label=label)  # fmt: skip


def _marked(axes: Any, places: Any, found: Sequence[Estimate], **style: Any) -> Any:
    """Draw a line through the values, with their intervals where they have any."""
    values = _values(found)
    spread = [
        (0.0, 0.0)
        if e.value is None or e.low is None or e.high is None
        # where noise can only add, as to an ECE, an interval need not hold the value itself
        else (max(0.0, e.value - e.low), max(0.0, e.high - e.value))
        for e in found
    ]
    errors = np.array(spread).reshape(len(found), 2).T
    return axes.errorbar(
        places, values, yerr=errors, marker="o", markersize=3.5, capsize=2, **style
    )


def _values(found: Sequence[Estimate]) -> Any:
    return np.array([np.nan if e.value is None else e.value for e in found], dtype=np.float64)


def _told(figure: Estimate) -> str:
    return "unknown" if figure.value is None else f"{figure.value:.3f}"


def _title(arm: ArmResult, file: str, evaluation: Evaluation) -> str:
    return _plain(f"{arm.name}: {file}" if len(evaluation.arms) > 1 else file)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # which matplotlib would set as mathematics


def _panels(rows: int, columns: int) -> tuple[Any, Any]:
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, which keeps state and may look for a display
    return figure, figure.subplots(rows, columns, squeeze=False)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
