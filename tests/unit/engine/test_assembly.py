"""Loading models: what is set up around them."""

from __future__ import annotations

import pytest
import torch

from dspark.config import DraftConfig, ModelConfig
from dspark.engine.assembly import load_draft_engine
from dspark.errors import ConfigError


@pytest.mark.parametrize(
    ("device", "threads", "want"),
    [("cuda", 0, [1]), ("cuda", 3, [3]), ("cpu", 0, []), ("cpu", 3, [3])],
)
def test_one_thread_serves_a_gpu_unless_told_otherwise(
    device: str, threads: int, want: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    model = ModelConfig(drafter="none", device=device, threads=threads)
    with pytest.raises(ConfigError, match="no drafter"):
        load_draft_engine(model, DraftConfig())
    assert used == want
