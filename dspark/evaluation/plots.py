"""Figures of benchmarks, as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dspark.errors import ConfigError


def frontier(
    path: Path,
    lines: Mapping[str, Sequence[tuple[float, float, str]]],  # by name: x, y, what the point is
    title: str,
) -> None:
    """Throughput against per-user speed, a line an endpoint; ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib: pip install 'dspark-serve[bench]', or leave --plot out"
        ) from error
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in lines.items():
        xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
        axes.plot(xs, ys, marker="o", label=name)
        for x, y, label in points:
            axes.annotate(label, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set_xlabel("speed of a user, tokens/s")
    axes.set_ylabel("throughput, tokens/s")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
