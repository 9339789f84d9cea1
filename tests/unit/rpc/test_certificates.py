"""Certificates in files: what is refused, and what a change of the files does."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from helpers.certificates import DAY, Authority, Issued, Secret, ServiceSecret, service_secret

from dspark.config import ClientTls, NetworkConfig, ServiceTls
from dspark.errors import ConfigError
from dspark.rpc.certificates import CertificateFiles, public_certificates, service_certificates

OURS, THEIRS = Authority("ours"), Authority("theirs")


def files_of(secret: ServiceSecret) -> CertificateFiles:
    files = service_certificates(secret.network.tls)
    assert files is not None
    return files


def test_without_files_there_are_none() -> None:
    assert service_certificates(NetworkConfig().tls) is None
    assert public_certificates(ClientTls()) is None


def test_files_are_read(tmp_path: Path) -> None:
    issued = OURS.issue()
    now = files_of(ServiceSecret(tmp_path, issued, OURS.pem)).current()
    assert (now.chain, now.key, now.authority) == (issued.chain, issued.key, OURS.pem)
    assert issued.key.decode() not in repr(now)


def test_an_authority_between_and_a_bundle_are_followed(tmp_path: Path) -> None:
    between = Authority("between", above=OURS)
    files_of(ServiceSecret(tmp_path, between.issue(), THEIRS.pem + OURS.pem))


@pytest.mark.parametrize(
    ("issued", "why"),
    [
        (OURS.issue(expires_in=-timedelta(hours=1)), "expired at"),
        (OURS.issue(begins_in=timedelta(hours=1)), "check the clock"),
        (OURS.issue("other.internal"), r"must carry .* dspark\.internal.* carries other\.internal"),
        (OURS.issue(uses=[ExtendedKeyUsageOID.SERVER_AUTH]), "server auth and client auth"),
        (THEIRS.issue(), "not issued by an authority in"),
        (Authority("ours").issue(), "not issued by"),  # of the same name
        (Issued(OURS.issue().chain, OURS.issue().key), "is not that of the certificate"),
        (Issued(b"", OURS.issue().key), "no certificates in PEM"),
        (Issued(OURS.issue().chain, b"no key"), "no private key in PEM"),
        (Issued(b"x" * 300_000, OURS.issue().key), "is over"),
    ],
)
def test_what_peers_would_refuse_is_refused_at_the_start(
    tmp_path: Path, issued: Issued, why: str
) -> None:
    with pytest.raises(ConfigError, match=why) as refusal:
        files_of(ServiceSecret(tmp_path, issued, OURS.pem))
    assert "BEGIN" not in str(refusal.value)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere\.pem: No such file"):
        service_certificates(ServiceTls(*(str(tmp_path / "nowhere.pem"),) * 3))


def test_a_public_certificate_may_carry_any_name(tmp_path: Path) -> None:
    issued = THEIRS.issue("dspark.example.com", uses=[ExtendedKeyUsageOID.SERVER_AUTH])
    secret = Secret(tmp_path, tls_crt=issued.chain, tls_key=issued.key)
    files = public_certificates(ClientTls(secret.path("tls_crt"), secret.path("tls_key")))
    assert files is not None
    assert files.current().authority is None


def test_a_swap_is_seen_at_once(tmp_path: Path) -> None:
    secret = service_secret(tmp_path, OURS)
    files = files_of(secret)
    before = files.current()
    assert files.current() is before
    renewed = OURS.issue(expires_in=7 * DAY)
    secret.renew(renewed, OURS.pem)
    after = files.current()
    assert after.chain == renewed.chain
    assert (after.generation, after.expires_at > before.expires_at) == (before.generation + 1, True)


def test_files_written_in_place_are_seen_too(tmp_path: Path) -> None:
    first, second = OURS.issue(), OURS.issue()
    paths = [tmp_path / name for name in ("crt", "key", "ca")]

    def put(issued: Issued) -> None:
        for path, data in zip(paths, (issued.chain, issued.key, OURS.pem), strict=True):
            path.write_bytes(data)

    put(first)
    files = CertificateFiles(*map(str, paths), service=True)
    put(second)
    assert files.current().chain == second.chain


def test_what_cannot_be_used_leaves_the_last_in_force(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = service_secret(tmp_path, OURS)
    files = files_of(secret)
    before = files.current()
    stranger = THEIRS.issue()
    secret.renew(stranger, OURS.pem)
    assert files.current() is before
    assert files.current() is before
    (told,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert "the last stay" in told
    assert "not issued" in told
    secret.swap()  # nothing is there any more
    assert files.current() is before
    good = OURS.issue()
    secret.renew(good, OURS.pem)
    assert files.current().chain == good.chain
    for key in (before.key, stranger.key, good.key):
        assert key.decode() not in caplog.text


def test_what_can_be_used_only_later_is_used_then(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspark.rpc.certificates._LOOK_AGAIN_S", 0.0)
    secret = service_secret(tmp_path, OURS)
    files = files_of(secret)
    before = files.current()
    renewed = OURS.issue(begins_in=timedelta(hours=1), expires_in=2 * DAY)  # by a clock ahead
    secret.renew(renewed, OURS.pem)
    for _ in range(3):
        assert files.current() is before
    (told,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert "check the clock" in told
    at(monkeypatch, before.expires_at - timedelta(hours=1))
    assert files.current().chain == renewed.chain  # the same files
    assert files.current().generation == before.generation + 1


def at(monkeypatch: pytest.MonkeyPatch, now: datetime) -> None:
    """Have it be `now` for certificates."""

    class Clock:
        @staticmethod
        def now(zone: object) -> datetime:
            return now

    monkeypatch.setattr("dspark.rpc.certificates.datetime", Clock)


def test_the_log_says_that_a_certificate_has_expired(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = service_secret(tmp_path, OURS)
    files = files_of(secret)
    late = files.current().expires_at + timedelta(seconds=1)
    at(monkeypatch, late)
    files.current()
    files.current()  # not again so soon
    (told,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert "has expired" in told
    secret.renew(OURS.issue(expires_in=3 * DAY), OURS.pem)
    assert files.current().expires_at > late
