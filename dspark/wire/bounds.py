"""How large anything that crosses a process may be."""

from __future__ import annotations

MAX_ID_CHARS = 128
MAX_CANDIDATES = 4096
MAX_POSITION = 1 << 24
MAX_WORKS = 4096
MAX_DRAFTED = 4096  # draft tokens of one request in one step, by whatever drafter
MAX_OUTCOMES = 256  # blocks in one report
