"""The weights' average follows them, and takes their place only for a while."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dspark.training.averaging import AveragedWeights


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_it_is_the_average_that_its_decay_says(decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(3, 2)
    averaged = AveragedWeights(module, decay)
    want = module.weight.detach().double()
    for n in range(1, 40):
        with torch.no_grad():
            module.weight.copy_(torch.randn(2, 3, generator=generator))
        averaged.update()
        kept = min(decay, n / (n + 10))
        want = kept * want + (1 - kept) * module.weight.detach().double()
    with averaged.in_place():
        torch.testing.assert_close(module.weight.double(), want, atol=1e-5, rtol=1e-5)


def test_the_module_gets_its_own_weights_back() -> None:
    module = nn.Linear(3, 2)
    averaged = AveragedWeights(module, 0.9)
    own = module.weight.detach().clone()
    with torch.no_grad():
        module.weight += 1.0
    with averaged.in_place():
        assert torch.equal(module.weight, own)
    assert torch.equal(module.weight, own + 1.0)


def test_a_saved_average_goes_on() -> None:
    module = nn.Linear(3, 2)
    whole, cut = AveragedWeights(module, 0.99), AveragedWeights(module, 0.99)
    for half in range(2):
        for step in range(5):
            with torch.no_grad():
                module.weight += 0.1 * (half + step)
            whole.update()
            cut.update()
        resumed = AveragedWeights(module, 0.99)
        resumed.load(cut.state())
        cut = resumed
    assert all(map(torch.equal, whole.state()["average"], cut.state()["average"]))
