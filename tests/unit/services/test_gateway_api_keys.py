"""A folder of API keys: what it may hold, who is known by it, and what a change does."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from helpers.certificates import Secret

from dspark.errors import ConfigError, UnauthenticatedError
from dspark.services.gateway.api_keys import LOOK_EVERY_S, MAX_KEY_CHARS, MAX_KEYS, ApiKeys

ALICE, BOB, CAROL = "alice-key-0123456789", "bob-key-0123456789ab", "carol-key-0123456789"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def look_again(self) -> None:
        self.now += LOOK_EVERY_S


def bearer(key: str) -> list[str]:
    return [f"Bearer {key}"]


def refused(keys: ApiKeys, *headers: str) -> str:
    with pytest.raises(UnauthenticatedError) as refusal:
        keys.client_of(headers)
    return str(refusal.value)


def test_a_key_names_its_client(tmp_path: Path) -> None:
    (tmp_path / "alice").write_text(ALICE + "\n")
    (tmp_path / "bob.next").write_text(BOB)
    (tmp_path / ".hidden").write_text(CAROL)
    keys = ApiKeys(str(tmp_path))
    assert keys.client_of(bearer(ALICE)) == "alice"
    assert keys.client_of([f"bearer {BOB}"]) == "bob.next"
    assert "not known" in refused(keys, *bearer(CAROL))


def test_what_is_no_key_is_refused_without_repeating_it(tmp_path: Path) -> None:
    (tmp_path / "alice").write_text(ALICE)
    keys = ApiKeys(str(tmp_path))
    assert "no API key was sent" in refused(keys)
    for sent in (ALICE[:-1], ALICE + "x", ALICE.upper(), "ü" * 20, "x" * 100_000, "\ud800" * 20):
        told = refused(keys, *bearer(sent))
        assert "not known" in told
        assert sent not in told
    for header in (ALICE, "Bearer", "Bearer ", f"Basic {ALICE}", "", f"Bearer  {ALICE}"):
        assert ALICE not in refused(keys, header)
    assert "must be one" in refused(keys, *bearer(ALICE), *bearer(ALICE))


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "holds no API keys"),
        ({"alice": ""}, "must hold one key"),
        ({"alice": "short"}, "16 to 256"),
        ({"alice": "x" * (MAX_KEY_CHARS + 1)}, "16 to 256"),
        ({"alice": f"{ALICE} {BOB}"}, "without spaces"),
        ({"alice": f"{ALICE}\n{BOB}"}, "must hold one key"),
        ({"alice": "schlüssel-0123456789"}, "ASCII"),
        ({"alice": "x" * 5000}, "over 1024 bytes"),
        ({"al ice": ALICE}, "a client's name is made of"),
        ({"alice": ALICE, "bob": ALICE}, "alice and bob have the same key"),
        ({f"c{i}": f"{ALICE}{i}" for i in range(MAX_KEYS + 1)}, "at most 256"),
    ],
)
def test_folders_that_cannot_be_meant_are_refused_at_the_start(
    tmp_path: Path, files: dict[str, str], why: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=why) as refusal:
        ApiKeys(str(tmp_path))
    assert ALICE not in str(refusal.value)


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: No such file"):
        ApiKeys(str(tmp_path / "nowhere"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="is no file"):
        ApiKeys(str(tmp_path))


def test_keys_come_and_go_with_the_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    secret, clock = Secret(tmp_path, alice=ALICE.encode()), Clock()
    keys = ApiKeys(str(tmp_path), clock)
    secret.swap(bob=BOB.encode())
    assert keys.client_of(bearer(ALICE)) == "alice"  # not looked at yet
    clock.look_again()
    refused(keys, *bearer(ALICE))
    assert keys.client_of(bearer(BOB)) == "bob"
    assert "they are of 1 clients: bob" in caplog.text
    assert ALICE not in caplog.text
    assert BOB not in caplog.text


@pytest.mark.parametrize("broken", [{}, {"bob": b"short"}, {"bob": b"x" * 5000}])
def test_the_last_keys_stay_while_the_folder_cannot_be_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: dict[str, bytes]
) -> None:
    secret, clock = Secret(tmp_path, alice=ALICE.encode()), Clock()
    keys = ApiKeys(str(tmp_path), clock)
    secret.swap(**broken)
    for _ in range(3):
        clock.look_again()
        assert keys.client_of(bearer(ALICE)) == "alice"
    assert len([r for r in caplog.records if "the last stay" in r.getMessage()]) == 1
    secret.swap(carol=CAROL.encode())
    clock.look_again()
    assert keys.client_of(bearer(CAROL)) == "carol"
    refused(keys, *bearer(ALICE))
