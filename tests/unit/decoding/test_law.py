"""Temperature, top-k and top-p, against transformers' own processors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dspark.decoding.law import proposal_law, target_law

settings = st.tuples(
    st.floats(0.1, 3.0), st.integers(0, 40), st.floats(0.05, 1.0), st.integers(0, 2**31)
)


def arguments(temperature: float, top_k: int, top_p: float) -> tuple[torch.Tensor, ...]:
    return torch.tensor([temperature]), torch.tensor([top_k]), torch.tensor([top_p])


@given(settings)
def test_the_target_law_is_that_of_transformers(case: tuple[float, int, float, int]) -> None:
    temperature, top_k, top_p, seed = case
    logits = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed)) * 4
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    want = torch.softmax(scores, -1)
    got = target_law(logits, *arguments(temperature, top_k, top_p))
    # the two sum the nucleus in opposite orders: a token on its very edge may fall either way
    edge = (want > 0) != (got > 0)
    if edge.any():
        assert want[edge].sum() + got[edge].sum() < 0.5
        mass = torch.softmax(logits / temperature, -1).sort(descending=True).values.cumsum(-1)
        assert (mass - top_p).abs().min() < 1e-5
    else:
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@given(settings, st.integers(1, 32))
def test_a_proposal_is_a_law_on_its_candidates(
    case: tuple[float, int, float, int], candidates: int
) -> None:
    temperature, top_k, top_p, seed = case
    logits = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed)) * 4
    ids, probs = proposal_law(logits, candidates, *arguments(temperature, top_k, top_p))
    assert ids.shape == (1, candidates)
    assert len(set(ids[0].tolist())) == candidates
    assert probs.sum().item() == pytest.approx(1.0, abs=1e-5)
    kept = int((probs > 0).sum())
    assert kept <= (top_k or candidates)
    if top_k == 0 and top_p == 1.0 and candidates == 32:
        whole = torch.softmax(logits / temperature, -1)
        torch.testing.assert_close(probs, whole.gather(1, ids))


def test_rows_keep_their_own_settings() -> None:
    logits = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    settings = [(1.0, 0, 1.0), (0.5, 3, 1.0), (1.0, 0, 0.3)]
    together = target_law(logits, *(torch.tensor(column) for column in zip(*settings, strict=True)))
    for i, one in enumerate(settings):
        torch.testing.assert_close(
            together[i : i + 1], target_law(logits[i : i + 1], *arguments(*one))
        )


def test_a_nucleus_wider_than_the_first_guess_is_found() -> None:
    logits = torch.zeros(1, 5000)  # flat: half of the mass is half of the vocabulary
    law = target_law(logits, *arguments(1.0, 0, 0.5))
    assert int((law > 0).sum()) == pytest.approx(2500, abs=2)


def test_ties_with_the_last_of_top_k_stay_as_in_transformers() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    want = torch.softmax(TopKLogitsWarper(2)(None, logits), -1)
    torch.testing.assert_close(target_law(logits, *arguments(1.0, 2, 1.0)), want)


@pytest.mark.parametrize(("temperature", "top_p"), [(1e-5, 1.0), (100.0, 1.0), (1.0, 1e-46)])
def test_extreme_settings_still_give_a_law(temperature: float, top_p: float) -> None:
    logits = torch.tensor([[30.0, 40.0, 39.0, -300.0]])
    _, proposed = proposal_law(logits, 3, *arguments(temperature, 0, top_p))
    for law in (target_law(logits, *arguments(temperature, 0, top_p)), proposed):
        assert torch.isfinite(law).all()
        assert law.sum().item() == pytest.approx(1.0, abs=1e-6)
    if temperature < 1 or top_p < 1:
        assert proposed.tolist() == [[1.0, 0.0, 0.0]]
