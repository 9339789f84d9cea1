"""Settings that change between two steps: what follows them, what goes on, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.tables import flat_table
from helpers.tiny import ScriptedLink, Tally, run, tiny_engine, tiny_target

from dspark.config import ServiceClass
from dspark.engine.verifier import VerifierEngine
from dspark.errors import ConfigError, InvalidRequestError, OverloadedError
from dspark.types import Request, SamplingParams, StepPlan, VerificationPolicy

TARGET = tiny_target()
PROMPT = (3, 1, 4, 1, 5)


def request(name: str, kind: str = "", epoch: int = 0) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=60)
    return Request(name, PROMPT, sampling, service_class=kind, epoch=epoch)


def drafted(policy: str = "fixed", kind: str = "") -> tuple[VerifierEngine, list[int]]:
    """An engine with a request under way, whose drafter knows what it will say."""
    one = request("one", kind)
    (said,) = run(tiny_engine(TARGET), [request("one")]).tokens.values()
    names = ("one", "two", "begun-elsewhere")  # which say the same
    text = {name: [*PROMPT, *said] for name in names}
    link = ScriptedLink(text, TARGET.vocab_size, 0.0)
    classes = {kind: ServiceClass(weight=4.0)} if kind else {}
    engine = tiny_engine(TARGET, link=link, block_size=4, policy=policy, classes=classes)
    engine.add(one)
    return engine, said


def steps(engine: VerifierEngine, tally: Tally, count: int) -> list[int]:
    """How many tokens were drafted for each step."""
    done = []
    for _ in range(count):
        results = engine.step()
        tally.add(results)
        done.append(sum(result.drafted for result in results))
    return done


def finish(engine: VerifierEngine, tally: Tally) -> list[int]:
    while engine.has_work:
        tally.add(engine.step())
    return tally.tokens["one"]


def test_policy_and_block_size_change_in_mid_stream() -> None:
    engine, said = drafted()
    tally = Tally()
    assert steps(engine, tally, 4)[-2:] == [4, 4]
    engine.reconfigure(replace(engine.config, block_size=2))
    assert engine.block_size == 2
    assert steps(engine, tally, 3)[-2:] == [2, 2]
    engine.reconfigure(replace(engine.config, policy="off", block_size=0))
    assert steps(engine, tally, 3)[-2:] == [0, 0]
    engine.reconfigure(replace(engine.config, policy="fixed"))
    assert steps(engine, tally, 3)[-2:] == [4, 4]
    assert finish(engine, tally) == said


def test_a_plan_that_is_valid_holds_until_it_lapses() -> None:
    engine, _ = drafted()
    tally = Tally()
    engine.set_plan(StepPlan(epoch=1, policy=VerificationPolicy.FIXED, valid_for_s=60.0))
    engine.reconfigure(replace(engine.config, policy="off"))
    assert steps(engine, tally, 4)[-2:] == [4, 4]
    engine.set_plan(StepPlan(epoch=2, policy=VerificationPolicy.FIXED, valid_for_s=0.0))
    assert steps(engine, tally, 3)[-2:] == [0, 0]


def test_it_becomes_adaptive_only_with_step_times() -> None:
    engine, said = drafted()
    tally = Tally()
    steps(engine, tally, 2)
    with pytest.raises(ConfigError, match="began as fixed and has no step times"):
        engine.reconfigure(replace(engine.config, policy="adaptive"))
    assert engine.config.policy == "fixed"
    assert finish(engine, tally) == said

    engine, _ = drafted()
    engine.table = flat_table((1, 8), (1, 5), ((1.0, 1.1), (1.2, 1.3)))
    engine.reconfigure(replace(engine.config, policy="adaptive"))
    steps(engine, Tally(), 1)
    assert engine.explain(1)[0].policy is VerificationPolicy.ADAPTIVE


def test_classes_come_and_go() -> None:
    engine, said = drafted(kind="gold")
    tally = Tally()
    steps(engine, tally, 2)
    engine.reconfigure(replace(engine.config, classes={"slow": ServiceClass(weight=0.5)}))
    engine.add(request("two", "slow"))
    (one,) = engine.roster.running.values()
    assert one.service == ServiceClass()  # its class is gone
    with pytest.raises(InvalidRequestError, match="there is default, slow"):
        engine.add(request("three", "gold"))
    engine.add(request("begun-elsewhere", "gold", epoch=1))
    steps(engine, tally, 1)
    assert engine.last_report is not None
    assert {load.name for load in engine.last_report.classes} == {"default", "slow"}
    assert finish(engine, tally) == said
    assert len(tally.tokens) == 3


def test_the_queue_is_bounded_anew() -> None:
    engine = tiny_engine(TARGET)
    engine.reconfigure(replace(engine.config, max_waiting=1))
    engine.add(request("one"))
    with pytest.raises(OverloadedError):
        engine.add(request("two"))
