"""Plots are written, and refused before a long measurement where they cannot be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dspark.errors import ConfigError
from dspark.evaluation.plots import Point, plot_lines, require_matplotlib

LINES = {"off": [Point(10, 10, "1 user"), Point(5, 20, "4 users")], "none": []}


def test_a_plot_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "frontier.png"
    plot_lines(LINES, path, title="t", x_label="x", y_label="y")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        plot_lines(LINES, tmp_path / "nowhere" / "p.png", title="t", x_label="x", y_label="y")


def test_a_missing_matplotlib_comes_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"dspark-serve\[bench\]"):
        require_matplotlib()
