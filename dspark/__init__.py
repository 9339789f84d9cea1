"""DSpark Serve: lossless speculative decoding as a service (arXiv 2607.05147)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspark.types import Request, SamplingParams, VerifyMode

if TYPE_CHECKING:
    from dspark.engine.llm import LLM, Generation

__all__ = ["LLM", "Generation", "Request", "SamplingParams", "VerifyMode", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # LLM pulls in torch and transformers: seconds that a gRPC client of ours need not wait.
    if name in ("LLM", "Generation"):
        from dspark.engine import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'dspark' has no attribute {name!r}")
