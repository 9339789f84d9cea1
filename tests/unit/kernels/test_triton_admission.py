"""Triton's admission against the planner's `ranked` search, under the interpreter or on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dspark.scheduling.planner import plan_lengths
from dspark.scheduling.survival import ABSENT, survivals_of
from dspark.types import Scale, Scales

pytest.importorskip("triton")
from dspark.kernels.triton.admission import MOST_TOKENS, admit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def admitted(
    logits: torch.Tensor,  # [S, B]
    lengths: list[int],
    scales: Scales,
    capacity: int,
    greedy: list[bool] | None = None,  # [S]; None: none is
) -> tuple[list[int], np.ndarray]:
    """What the kernel says."""
    got, survivals = admit(
        logits.to(DEVICE),
        torch.tensor(lengths, device=DEVICE),
        torch.tensor(greedy or [False] * len(lengths), device=DEVICE).long(),
        torch.tensor([scales.sampled.temperatures, scales.greedy.temperatures], device=DEVICE),
        torch.tensor([scales.sampled.biases, scales.greedy.biases], device=DEVICE),
        torch.tensor([capacity], device=DEVICE),
    )
    return got.tolist(), survivals.cpu().numpy()


def ranked(survivals: np.ndarray, capacity: int) -> list[int]:
    """What the planner says."""
    return plan_lengths(
        survivals, lambda first, last: np.ones(last - first + 1), ceiling=capacity, search="ranked"
    ).lengths


def alike(size: int, temperature: float = 1.0) -> Scales:
    scale = Scale((temperature,) * size, (0.0,) * size)
    return Scales(scale, scale)


def wanted(
    logits: torch.Tensor, lengths: list[int], greedy: list[bool], scales: Scales
) -> np.ndarray:
    """dspark.scheduling.survival's, ABSENT past a block's end."""
    exact = survivals_of(torch.sigmoid(logits.double()).numpy(), greedy, scales)
    return np.where(np.arange(logits.shape[1]) < np.array(lengths)[:, None], exact, ABSENT)


@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(0, 400), st.booleans(), st.booleans(),
    st.integers(0, 2**31),
)  # fmt: skip
@example(3, 7, 0, False, False, 1)
@example(3, 7, 1000, False, False, 1)
@example(17, 7, 60, True, False, 1)
def test_it_is_the_planners_ranked_search(
    sessions: int, size: int, capacity: int, alike: bool, ragged: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sessions, size, generator=generator) * 3
    if alike:  # a few values only: most tokens are tied with others, of equal products too
        logits = torch.tensor([-40.0, 0.0, 2.0, 40.0, float("inf")])[
            torch.randint(0, 5, logits.shape, generator=generator)
        ]
    lengths = [size] * sessions
    if ragged:
        lengths = torch.randint(0, size + 1, (sessions,), generator=generator).tolist()
    greedy = (torch.rand(sessions, generator=generator) < 0.5).tolist()
    temperatures = (torch.rand(2, size, generator=generator) + 0.5).tolist()
    biases = torch.randn(2, size, generator=generator).tolist()
    scales = Scales(*(Scale(tuple(t), tuple(b)) for t, b in zip(temperatures, biases, strict=True)))
    got, survivals = admitted(logits, lengths, scales, capacity, greedy)
    # exp and log differ by some units in fp64, which the rounding to fp32 may turn into one of it
    np.testing.assert_allclose(
        survivals, wanted(logits, lengths, greedy, scales), rtol=2e-7, atol=1e-38
    )
    assert got == ranked(survivals, capacity), "a plan of the very same survivals"
    assert sum(got) == min(capacity, sum(lengths))


def test_ties_go_by_position_then_session() -> None:
    logits = torch.zeros(3, 4)  # all alike: the survivals of a position are the same everywhere
    for capacity, want in [(1, [1, 0, 0]), (2, [1, 1, 0]), (4, [2, 1, 1]), (11, [4, 4, 3])]:
        assert admitted(logits, [4] * 3, alike(4), capacity)[0] == want
    sure = torch.full((3, 4), 1e4)  # clipped to all but 1, which no product of four may round away
    assert admitted(sure, [4] * 3, alike(4, 0.01), 5)[0] == [2, 2, 1], "equal along a row as well"


def test_no_capacity_and_more_than_all() -> None:
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    lengths = [6, 0, 3, 1, 6]
    assert admitted(logits, lengths, alike(6), 0)[0] == [0] * 5
    assert admitted(logits, lengths, alike(6), -3)[0] == [0] * 5
    assert admitted(logits, lengths, alike(6), 16)[0] == lengths
    assert admitted(logits, lengths, alike(6), 10**12)[0] == lengths


@pytest.mark.parametrize(("sessions", "size"), [(1024, 8), (512, 16), (1000, 7), (1170, 7)])
def test_full_steps(sessions: int, size: int) -> None:
    """Survivals underflow to values that many share; sizes are no powers of two."""
    generator = torch.Generator().manual_seed(sessions)
    logits = (torch.randn(sessions, size, generator=generator) * 4).round()
    got, survivals = admitted(logits, [size] * sessions, alike(size), 3000)
    assert got == ranked(survivals, 3000)


def test_a_step_that_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match=f"at most {MOST_TOKENS}"):
        admitted(torch.zeros(4097, 2), [2] * 4097, alike(2), 1)
