"""Service classes: whose tokens weigh more, whose floors are reserved, whose turn comes first."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from helpers.tables import flat_table
from helpers.tiny import ScriptedLink, Tally, run, tiny_engine, tiny_target

from dspark.config import EngineConfig, ServiceClass, build
from dspark.engine import roster
from dspark.engine.verifier import VerifierEngine
from dspark.errors import ConfigError, InvalidRequestError
from dspark.scheduling.round_times import RoundTimes
from dspark.types import ClassLoad, Request, SamplingParams

TARGET = tiny_target()
PROMPT = (3, 1, 4, 1, 5)
GAMMA = 4
CLASSES = {
    "fast": ServiceClass(weight=2.0, min_tokens_per_s=1e6),
    "prompt": ServiceClass(max_first_token_s=0.5),
    "batch": ServiceClass(weight=0.01),
}


def request(
    name: str, kind: str = "", tokens: int = 60, prompt: tuple[int, ...] = PROMPT
) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens)
    return Request(name, prompt, sampling, service_class=kind)


def drafted_engine(requests: list[Request], **settings: Any) -> VerifierEngine:
    """An engine whose drafter knows what the target will say."""
    said = run(tiny_engine(TARGET, classes=CLASSES), requests).tokens
    link = ScriptedLink(
        {r.id: [*r.prompt_token_ids, *said[r.id]] for r in requests}, TARGET.vocab_size, 0.0
    )
    return tiny_engine(
        TARGET, link=link, block_size=GAMMA, policy="adaptive", classes=CLASSES, **settings
    )


def by_request(tally: Tally, count: str) -> dict[str, int]:
    out: dict[str, int] = {}
    for result in tally.results:
        out[result.request_id] = out.get(result.request_id, 0) + getattr(result, count)
    return out


def test_settings_build_classes_and_name_what_is_wrong() -> None:
    config = build(EngineConfig, {"classes": {"fast": {"weight": 3, "min_tokens_per_s": 20}}})
    assert config.service_class("fast") == ServiceClass(weight=3, min_tokens_per_s=20)
    assert config.service_class("") == config.service_class("default") == ServiceClass()
    with pytest.raises(InvalidRequestError, match="there is default, fast") as caught:
        config.service_class("gold")
    assert caught.value.param == "service_class"
    for wrong, words in (
        ({"fast": 3}, "classes.fast must be a mapping"),
        ({"fast": {"wait": 3}}, "no setting 'wait'"),
        ({"fast": {"weight": 0}}, "weight must be a number between"),
        ({"fast": {"min_tokens_per_s": -1}}, "min_tokens_per_s must be"),
        ({"": {}}, "1 to 64 characters"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(EngineConfig, {"classes": wrong})
    replaced = build(EngineConfig, {"classes": {"default": {"weight": 5}}})
    assert replaced.service_class("").weight == 5


def test_an_engine_refuses_a_class_that_it_does_not_know() -> None:
    engine = tiny_engine(TARGET, classes=CLASSES)
    with pytest.raises(InvalidRequestError, match="no service class 'gold'"):
        engine.add(request("a", "gold"))


@pytest.fixture
def given_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables hold: what this machine takes for tiny models is not learnt."""
    monkeypatch.setattr(RoundTimes, "record", lambda *_, **__: None)


@pytest.mark.usefixtures("given_times")
def test_floors_are_verified_for_where_nothing_else_is() -> None:
    """A row costs more than any token is worth, and yet the floor's blocks are whole."""
    asked = [request("a", "fast"), request("b"), request("c", "batch")]
    engine = drafted_engine(asked)
    engine.table = flat_table((1, 8), (1, 5), ((10.0, 5000.0), (10.0, 5000.0)))
    tally = run(engine, asked)
    verified = by_request(tally, "verified")
    assert verified["a"] > 30
    assert verified["b"] == verified["c"] == 0
    plain = run(tiny_engine(TARGET, classes=CLASSES), asked)
    assert tally.tokens == plain.tokens


@pytest.mark.usefixtures("given_times")
def test_heavier_tokens_are_admitted_first() -> None:
    """Rows cost more than a light token is worth, and less than another."""
    asked = [request("a", "batch"), request("b"), request("c")]
    engine = drafted_engine(asked)
    engine.table = flat_table((1, 8), (1, 5), ((10.0, 12.0), (10.0, 12.0)))
    for one in asked:
        engine.add(one)
    tally = Tally()
    while len(engine.roster.running) == len(asked) or not tally.results:
        tally.add(engine.step())
    verified = by_request(tally, "verified")
    assert verified["b"] > 30
    assert verified["c"] > 30
    assert verified["a"] == 0


def test_what_is_due_first_begins_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(roster.time, "monotonic", lambda: now)
    engine = tiny_engine(TARGET, classes=CLASSES, max_requests=1)
    engine.add(request("patient", tokens=4))
    now += 1.0
    engine.add(request("urgent", "prompt", tokens=4))
    engine.add(request("also", "prompt", tokens=4))
    now += 0.1
    begun: list[str] = []
    while engine.has_work:
        begun += [r.request_id for r in engine.step() if r.request_id not in begun]
    assert begun == ["urgent", "also", "patient"]
    # but nobody waits for ever: who has waited for long is due before newcomers
    engine.add(request("patient", tokens=4))
    now += 16.0
    engine.add(request("urgent", "prompt", tokens=4))
    assert engine.step()[0].request_id == "patient"


def test_who_has_begun_goes_on_before_all_others() -> None:
    engine = tiny_engine(TARGET, classes=CLASSES, max_requests=1)
    engine.add(request("a"))
    engine.step()
    engine.roster.preempt(engine.roster.running["a"])
    engine.add(request("b", "prompt"))
    assert engine.step()[0].request_id == "a"


def test_what_another_verifier_began_comes_before_newcomers() -> None:
    engine = tiny_engine(TARGET, classes=CLASSES, max_requests=1)
    engine.add(request("new", "prompt", tokens=4))
    engine.add(replace(request("moved", tokens=4), epoch=1))
    assert engine.step()[0].request_id == "moved"


def test_a_prompt_that_is_soon_too_late_is_not_held_back() -> None:
    long = tuple(range(1, 31)) * 8
    rows = []
    for ceiling in (1e4, 1e-3):
        classes = {"prompt": ServiceClass(max_first_token_s=ceiling)}
        engine = tiny_engine(TARGET, classes=classes, prefill_chunk_tokens=128, prefill_stretch=1.0)
        engine.table = flat_table((1, 8), (1, 5), ((10.0, 50.0), (10.0, 50.0)))
        engine.add(request("a"))
        engine.step()
        engine.add(request("b", "prompt", prompt=long))
        # the ceiling of a millisecond is over before the next step begins
        until = time.monotonic() + 1e-3
        while time.monotonic() < until:
            pass
        engine.step()
        assert engine.last_report is not None
        rows.append(engine.last_report.prefill_tokens)
    assert rows[0] < 128 == rows[1]


def test_reports_tell_how_each_class_fares(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(roster.time, "monotonic", lambda: now)
    engine = tiny_engine(TARGET, classes=CLASSES)
    engine.add(request("a", "fast"))
    engine.add(request("b", "prompt"))
    engine.add(request("c"))
    now += 1.0  # behind the ceiling of "prompt"
    engine.step()
    assert engine.last_report is not None
    assert engine.last_report.classes == (
        ClassLoad("batch", 0, 0, 0, 0),
        ClassLoad("default", 1, 0, 0, 0),
        ClassLoad("fast", 1, 1, 0, 0),
        ClassLoad("prompt", 1, 0, 0, 1),
    )
    assert engine.floor_attainment == 1.0
    now += 5.0  # a token in five seconds, where a million a second were to come
    engine.step()
    assert engine.last_report.classes[2] == ClassLoad("fast", 1, 1, 1, 0)
    assert engine.floor_attainment == 0.0


def test_without_classes_nothing_is_reported() -> None:
    engine = tiny_engine(TARGET)
    engine.add(request("a"))
    engine.step()
    assert engine.last_report is not None
    assert engine.last_report.classes == ()
    assert engine.floor_attainment == 1.0
