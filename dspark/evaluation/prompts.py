"""Prompt files: one JSON object a line, with `prompt`, or `turns` of which the first is used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dspark.errors import ConfigError


def read_files(paths: Sequence[Path], limit: int = 0) -> dict[str, list[str]]:
    """Prompts by file, named by its stem, or by its path where stems are alike."""
    if len(set(paths)) < len(paths):
        raise ConfigError(f"a file of prompts is named twice among {', '.join(map(str, paths))}")
    unlike = len({path.stem for path in paths}) == len(paths)
    return {path.stem if unlike else str(path): read_prompts(path, limit) for path in paths}


def read_prompts(path: Path, limit: int = 0) -> list[str]:
    """User turns, in order; ConfigError names the line that has none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read prompts from {path}: {error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
            prompt = raw["prompt"] if "prompt" in raw else raw["turns"][0]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ConfigError(
                f'{path}:{number}: want {{"prompt": "…"}} or {{"turns": ["…"]}}; got {line[:80]!r}'
            ) from error
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError(f"{path}:{number}: the prompt must be non-empty text")
        prompts.append(prompt)
        if limit and len(prompts) == limit:
            break
    if not prompts:
        raise ConfigError(f"{path} holds no prompt")
    return prompts
