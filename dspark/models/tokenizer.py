"""The target's tokenizer. No torch: gateways load this and nothing else of a model."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from dspark.errors import ConfigError
from dspark.models.builtin import resolve_target


def load_tokenizer(target: str) -> Any:
    """Load it; ConfigError if the target has none."""
    try:
        return AutoTokenizer.from_pretrained(resolve_target(target))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the tokenizer of {target!r}: {error}") from error
