"""How much of what was drafted is verified, by which of the planner's searches."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from helpers.tables import flat_table
from helpers.tiny import (
    ScriptedLink,
    Tally,
    run,
    tiny_drafter,
    tiny_engine,
    tiny_target,
)
from hypothesis import given
from hypothesis import strategies as st

from dspark.config import ServiceClass
from dspark.engine.rounds import Round
from dspark.engine.sequence import Sequence
from dspark.engine.speculation import Speculation
from dspark.scheduling.explanation import Basis
from dspark.scheduling.step_table import StepTimeTable
from dspark.scheduling.survival import survival
from dspark.types import (
    BlockProposal,
    Fence,
    Request,
    SamplingParams,
    StepPlan,
    VerificationPolicy,
)

TARGET = tiny_target()
GAMMA = 4
# A third row a request costs as much as all before it, what follows is free; or every row is dear.
DENTED = flat_table((1, 8), (1, 2, 3, 5), ((10.0, 10.5, 21.0, 21.5), (10.0, 10.5, 21.0, 21.5)))
CHEAP = flat_table((1, 8), (1, 5), ((10.0, 10.1), (10.0, 10.1)))

some_blocks = st.lists(
    st.lists(st.floats(0.0, 1.0), min_size=GAMMA, max_size=GAMMA), min_size=2, max_size=4
)


def sequences(
    confidences: list[list[float]], temperature: float = 1.0, tokens: int = 0
) -> list[Sequence]:
    """Requests with blocks that were drafted for them."""
    made = []
    for i, row in enumerate(confidences):
        request = Request(str(i), (1, 2, 3), SamplingParams(temperature=temperature))
        sequence = Sequence(request, frozenset())
        sequence.proposal = BlockProposal(
            Fence(str(i), 0, 0, 3),
            np.full(len(row), tokens, dtype=np.int64),
            np.array(row, dtype=np.float32),
        )
        made.append(sequence)
    return made


def ready(name: int, service: ServiceClass) -> Sequence:
    """A request whose next token is to be decided."""
    sampling = SamplingParams(max_tokens=50)
    sequence = Sequence(Request(str(name), (1, 2, 3), sampling), frozenset(), service=service)
    sequence.computed = 2
    return sequence


def experienced(
    table: StepTimeTable,
    requests: int,
    usual: list[float],
    planner: str = "asynchronous",
    classes: Mapping[str, ServiceClass] | None = None,
) -> Speculation:
    """One that has seen rounds of so many requests, with blocks of `usual` confidences."""
    link = ScriptedLink({}, TARGET.vocab_size)
    engine = tiny_engine(
        TARGET,
        link=link,
        policy="adaptive",
        planner=planner,
        block_size=GAMMA,
        classes=classes or {},
    )
    engine.table = table
    speculation = engine._speculation
    for turn in range(60):
        drafted = turn // 10 % 2 == 0
        speculation._asked = GAMMA if drafted else 0
        speculation._ended = speculation._asked, False, False
        tokens = requests * (GAMMA + 1 if drafted else 1)
        if drafted:
            speculation.verification(sequences([usual] * requests), 0, requests)
            speculation.study()
            speculation._verification._promised = {}
        took_ms = table.at(1).ms(requests, tokens)
        speculation.learn(Round(requests, tokens, 0, took_ms, took_ms, 0.0, False, False))
    speculation._asked = GAMMA
    return speculation


@given(some_blocks, some_blocks, st.integers(1, 50))
def test_how_much_an_asynchronous_plan_verifies_hangs_on_no_token_at_hand(
    one: list[list[float]], other: list[list[float]], token: int
) -> None:
    """K comes from earlier steps: other tokens, with other confidences, move none of it."""
    requests = min(len(one), len(other))
    counts = []
    for blocks, tokens in ((one, 0), (other, token)):
        speculation = experienced(DENTED, requests, [0.9, 0.6, 0.3, 0.1])
        decoding = sequences(blocks[:requests], tokens=tokens)
        counts.append(sum(speculation.verification(decoding, 0, requests)))
    assert counts[0] == counts[1]
    assert 0 < counts[0] < requests * GAMMA


def test_survivals_at_hand_say_whose_tokens_they_are() -> None:
    speculation = experienced(DENTED, 2, [0.9, 0.6, 0.3, 0.1])
    decoding = sequences([[0.1, 0.1, 0.1, 0.1], [0.95, 0.95, 0.95, 0.95]])
    assert speculation.verification(decoding, 0, 2) == [0, 2]


def test_whole_blocks_are_verified_where_trimming_gains_nothing() -> None:
    """Algorithm 1 would drop the unlikely ones; that is not worth a mistake about times."""
    unlikely = [0.9, 0.6, 0.3, 0.001]
    for planner in ("synchronous", "asynchronous"):
        speculation = experienced(CHEAP, 2, [0.9, 0.8, 0.7, 0.6], planner)
        assert speculation.verification(sequences([unlikely] * 2), 0, 2) == [GAMMA, GAMMA]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_whole_blocks_are_looked_at_when_the_step_is_under_way(temperature: float) -> None:
    """All are verified by what earlier rounds say, so nothing has to be known of them before."""
    speculation = experienced(CHEAP, 2, [0.9, 0.8, 0.7, 0.6])
    judge = speculation._judges.now
    assert judge is not None
    gate = judge.gate
    gate._take_in()
    blocks = [[0.9, 0.5, 0.4, 0.2], [0.8, 0.7, 0.1, 0.1]]
    decoding = sequences(blocks, temperature)
    assert speculation.verification(decoding, 0, 2) == [GAMMA, GAMMA]
    assert speculation.planned.found is None
    assert not gate._latest
    assert not decoding[0].prospect.latest
    speculation.study()
    expected = [survival(np.array(block, dtype=np.float32)) for block in blocks]
    found = speculation.planned.found
    assert found is not None
    assert found.lengths == [GAMMA, GAMMA]
    assert found.promised == pytest.approx([block.sum() for block in expected])
    assert found.round_ms > 0.0
    (seen,) = gate._latest
    np.testing.assert_allclose(np.stack(seen), np.stack(expected), rtol=1e-6)
    np.testing.assert_allclose(decoding[0].prospect.latest[-1], expected[0], rtol=1e-6)
    speculation.study()  # once is enough
    assert len(gate._latest) == 1


@pytest.mark.parametrize("planner", ["synchronous", "asynchronous"])
def test_greedy_requests_are_searched_for_whatever_the_planner(planner: str) -> None:
    """Nothing can bias them, so each step takes the best there is."""
    speculation = experienced(DENTED, 2, [0.9, 0.6, 0.3, 0.1], planner)
    certain, hopeless = [1.0] * GAMMA, [0.0] * GAMMA
    assert speculation.verification(sequences([certain] * 2, 0.0), 0, 2) == [GAMMA, GAMMA]
    assert speculation.verification(sequences([hopeless] * 2, 0.0), 0, 2) == [0, 0]


def test_rounds_with_blocks_for_a_few_are_learnt_from_apart() -> None:
    speculation = experienced(DENTED, 6, [0.1] * GAMMA)
    judge = speculation._judges.now
    assert judge is not None
    drafting_ms = judge.times.draft_ms(6, GAMMA)
    assert judge.times.few_ms(6) is None
    for few in (True, False):
        # a few because the gate wants to see what texts are like, or because the plan has no more
        speculation._ended = GAMMA, True, few
        speculation.learn(Round(6, 12, 0, 10.0, 17.0, 3.0, False, False))
        assert judge.times.few_ms(6) == pytest.approx(7.0)
    assert judge.times.draft_ms(6, GAMMA) == drafting_ms


def test_floors_are_drafted_for_behind_a_closed_gate() -> None:
    """All together lose by drafting; one is to come faster than plain steps can make it."""
    dear = flat_table((1, 8), (1, 5), ((10.0, 500.0), (10.0, 500.0)))
    classes = {"fast": ServiceClass(min_tokens_per_s=150.0)}  # 1.5 tokens in a round of 10 ms
    speculation = experienced(dear, 3, [0.1] * GAMMA, "auto", classes)
    judge = speculation._judges.now
    assert judge is not None
    assert judge.gate.usual_size == 0
    for _ in range(80):
        speculation.classes.learn(10.0)  # rounds without drafts, since it is closed
    names = ["", "fast", ""]
    decoding = [ready(i, classes.get(name, ServiceClass())) for i, name in enumerate(names)]
    assert speculation._sizes(decoding, 0, StepPlan(), judge) == [0, GAMMA, 0]
    slower = [ready(0, ServiceClass(min_tokens_per_s=50.0))]  # a plain step is fast enough
    assert speculation._sizes(slower, 0, StepPlan(), judge) == [0]


def test_padded_shapes_are_planned_for_asynchronously() -> None:
    padded = StepTimeTable((1, 8), (1, 2), (1,), (((1.0, 2.0), (1.0, 2.0)),), padded=(1, 2, 4, 8))
    assert experienced(padded, 2, [0.5] * GAMMA, "auto")._verification._asynchronous
    assert not experienced(DENTED, 2, [0.5] * GAMMA, "auto")._verification._asynchronous


@pytest.mark.parametrize("most", [1, 2])
def test_no_more_requests_are_drafted_for_than_the_plan_allows(most: int) -> None:
    drafter = tiny_drafter(TARGET)
    requests = [
        Request(str(i), (i + 1, 2, 3), SamplingParams(temperature=0.0, max_tokens=30 - 5 * i))
        for i in range(4)
    ]
    engine = tiny_engine(TARGET, drafter)
    engine.set_plan(StepPlan(policy=VerificationPolicy.FIXED, max_blocks=most))
    for request in requests:
        engine.add(request)
    tally, drafted = Tally(), []
    while engine.has_work:
        results = engine.step()
        tally.add(results)
        drafted.append(sum(result.drafted > 0 for result in results))
    assert max(drafted) == most
    assert tally.tokens == run(tiny_engine(TARGET), requests).tokens


@pytest.mark.parametrize(
    ("planner", "temperature", "basis"),
    [("asynchronous", 1.0, Basis.RANKED), ("synchronous", 1.0, Basis.CAUSAL),
     ("asynchronous", 0.0, Basis.GLOBAL)],
)  # fmt: skip
def test_what_was_planned_is_told(planner: str, temperature: float, basis: Basis) -> None:
    speculation = experienced(DENTED, 2, [0.9, 0.6, 0.3, 0.1], planner)
    decoding = sequences([[0.9, 0.5, 0.4, 0.2], [0.8, 0.7, 0.1, 0.1]], temperature)
    lengths = speculation.verification(decoding, 0, 2)
    speculation.study()
    planned = speculation.planned
    assert (planned.basis, planned.requests) == (basis, 2)
    assert planned.ceiling == (sum(lengths) if basis is Basis.RANKED else None)
    assert planned.found is not None
    assert planned.found.lengths == lengths
    blocks = [s.proposal.confidences for s in decoding if s.proposal is not None]
    assert planned.confidences == blocks
    admitted = [survival(b)[:n].sum() for b, n in zip(blocks, lengths, strict=True)]
    assert planned.found.expected == pytest.approx(2 + sum(admitted))


def test_who_has_a_floor_is_among_the_few() -> None:
    classes = {"fast": ServiceClass(min_tokens_per_s=150.0)}
    dear = flat_table((1, 8), (1, 5), ((10.0, 500.0), (10.0, 500.0)))
    speculation = experienced(dear, 6, [0.1] * GAMMA, "auto", classes)
    for _ in range(80):
        speculation.classes.learn(10.0)
    plain, fast = ServiceClass(), classes["fast"]
    decoding = [ready(i, fast if i in (3, 5) else plain) for i in range(6)]
    few = speculation._few(decoding, 3)
    assert [s.request.id for s in few] == ["3", "5", "0"]
    assert speculation._few(decoding, 1) == few[:2]
    assert [s.request.id for s in speculation._few(decoding[:3], 2)] == ["0", "1"]
