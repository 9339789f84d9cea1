"""How kernels are cut and scheduled, by GPU: data that scripts/tune_kernels.py writes.

A GPU that is not named takes what the nearest older one takes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dspark.kernels.triton.launch import capability_of

_FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Of attention over pages."""

    split_keys: int  # of a stretch: its program's share of a long sequence
    block_keys: int  # that a program reads at once
    warps: int
    stages: int
    long_rows: int  # rows times heads of a prompt's tile, and the same three for it
    long_block_keys: int
    long_warps: int
    long_stages: int


def attention_config(device: torch.device, width: int) -> AttentionConfig:
    """For heads of `width`."""
    return config_for("attention", capability_of(device), width)


@cache
def config_for(kernel: str, capability: int, width: int) -> AttentionConfig:
    """The same for a GPU by name, such as 90."""
    known: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))[kernel]
    older = [name for name in known if int(name) <= capability]
    entries = known[max(older, key=int) if older else min(known, key=int)]
    return AttentionConfig(**entries[min((w for w in entries if int(w) >= width), key=int)])
