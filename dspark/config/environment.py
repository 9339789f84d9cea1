"""What the environment decides: where files are kept, and which operators compute."""

from __future__ import annotations

import os
from pathlib import Path

from dspark.errors import ConfigError


def cache_folder() -> Path:
    """For models and built operators: $DSPARK_CACHE, else $XDG_CACHE_HOME/dspark, else ~/.cache."""
    if explicit := os.environ.get("DSPARK_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dspark"


def cpu_operators() -> str:
    """$DSPARK_CPU_OPERATORS: auto (default), amx, avx512, avx2, or none for torch alone."""
    wanted = os.environ.get("DSPARK_CPU_OPERATORS", "auto")
    if wanted not in ("auto", "amx", "avx512", "avx2", "none"):
        raise ConfigError(
            f"DSPARK_CPU_OPERATORS must be auto, amx, avx512, avx2 or none; got {wanted!r}"
        )
    return wanted


def cpu_operators_folder() -> Path | None:
    """$DSPARK_CPU_OPERATORS_FOLDER: of operators built beforehand, as images bring them."""
    explicit = os.environ.get("DSPARK_CPU_OPERATORS_FOLDER")
    return Path(explicit) if explicit else None


def kernels_wanted() -> str:
    """$DSPARK_KERNELS: auto (default: by device), triton, or reference for torch alone."""
    wanted = os.environ.get("DSPARK_KERNELS", "auto")
    if wanted not in ("auto", "triton", "reference"):
        raise ConfigError(f"DSPARK_KERNELS must be auto, triton or reference; got {wanted!r}")
    return wanted
