"""Lines through labelled points, as PNG; needs the extra `bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Point:
    """`label` is written beside it."""

    x: float
    y: float
    label: str = ""


def require_matplotlib() -> None:
    """ConfigError if it is missing: to be asked before a long measurement, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib: pip install 'dspark-serve[bench]', or leave the plot out"
        ) from error


def plot_lines(
    lines: Mapping[str, Sequence[Point]], path: Path, *, title: str, x_label: str, y_label: str
) -> None:
    """One line a name, through its points in order; both axes begin at 0."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 5.0), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, which keeps state and may look for a display
    axes = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
    for number, (name, points) in enumerate(lines.items()):
        (line,) = axes.plot([p.x for p in points], [p.y for p in points], marker="o", label=name)
        for point in points:
            axes.annotate(
                point.label,
                (point.x, point.y),
                xytext=(5, -12 if number % 2 else 5),  # apart where lines meet
                textcoords="offset points",
                fontsize="small",
                color=line.get_color(),
            )
    axes.margins(0.15)  # room for labels; before the limits, which end autoscaling
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the plot to {path}: {error}") from error
