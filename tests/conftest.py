"""For all tests: few threads, since tiny models gain nothing from more; fixed examples."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("dspark", derandomize=True, deadline=None)
settings.load_profile("dspark")
