"""Secrets that must be there, and the certificates in them. No value is ever shown."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from dspark.cli.kube_doctor.findings import Finding, failed, listed, ok, unseen, warning
from dspark.cli.kube_doctor.manifests import WantedSecret
from dspark.cli.kube_doctor.objects import Denied, Raw, Single, mapping

SOON = timedelta(days=14)


def check_secrets(
    wanted: tuple[WantedSecret, ...], there: Mapping[str, Single], now: datetime
) -> Iterator[Finding]:
    """Each secret that the chart does not make itself; `there`: by name."""
    for secret in wanted:
        found = there.get(secret.name)
        check = f"secret {secret.name}"
        if isinstance(found, Denied):
            yield unseen(check, found)
        elif found is None:
            keys = f" with the keys {listed(sorted(secret.keys))}" if secret.keys else ""
            yield failed(check, "it does not exist", f"make it{keys} before the install")
        else:
            yield from _check(check, secret, found, now)


def check_certificate(check: str, found: Raw, dns_name: str, now: datetime) -> Iterator[Finding]:
    """A TLS secret: certificate, its key, who signed it, for whom, and until when."""
    try:
        leaf = x509.load_pem_x509_certificates(secret_value(found, "tls.crt"))[0]
        key = serialization.load_pem_private_key(secret_value(found, "tls.key"), password=None)
    except (ValueError, TypeError, IndexError):
        yield failed(check, "tls.crt or tls.key is no PEM", "make the secret anew from PEM files")
        return
    if _public(leaf.public_key()) != _public(key.public_key()):
        yield failed(check, "tls.key is not the key of tls.crt", "make the secret anew")
        return
    ends = leaf.not_valid_after_utc
    if ends <= now or leaf.not_valid_before_utc > now:
        when = f"expired on {ends:%Y-%m-%d}" if ends <= now else "is not valid yet"
        yield failed(check, f"the certificate {when}", "renew it; pods read it anew by themselves")
        return
    names = _names(leaf)
    if dns_name and dns_name not in names:
        yield failed(
            check,
            f"the certificate is for {listed(names) or 'no name'}",
            f"services dial each other as {dns_name}: make one with that DNS name",
        )
        return
    if problem := _signer(leaf, secret_value(found, "ca.crt"), now):
        yield failed(check, problem, "put the CA that signed tls.crt into ca.crt")
        return
    said = f"for {listed(names) or 'no name'}, until {ends:%Y-%m-%d}"
    if ends - now < SOON:
        yield warning(
            check,
            f"the certificate ends soon: {said}",
            "renew it, or see why cert-manager has not (kubectl describe certificate)",
        )
    else:
        yield ok(check, f"certificate {said}")


def secret_value(found: Raw, key: str) -> bytes:
    """Of one key; empty without it."""
    try:
        return base64.b64decode(str(mapping(found, "data").get(key, "")), validate=True)
    except (binascii.Error, ValueError):
        return b""


def _check(check: str, secret: WantedSecret, found: Raw, now: datetime) -> Iterator[Finding]:
    keys = set(mapping(found, "data"))
    if missing := sorted(secret.keys - keys):
        yield failed(
            check,
            f"it lacks {listed(missing)}; it has {listed(sorted(keys)) or 'no keys'}",
            "add them",
        )
    elif empty := sorted(k for k in secret.keys if not secret_value(found, k)):
        yield failed(check, f"{listed(empty)} is empty", "give it its value")
    elif secret.any_key and not any(secret_value(found, k) for k in keys):
        yield failed(
            check,
            "it holds no API key, so that nobody could get in",
            "add one: the key's name is the client's, its value the API key",
        )
    elif secret.certificate:
        yield from check_certificate(check, found, secret.dns_name, now)
    elif secret.any_key:
        yield ok(check, f"{len(keys)} API keys")
    else:
        yield ok(check, "there" + (f", with {listed(sorted(secret.keys))}" if secret.keys else ""))


def _names(leaf: x509.Certificate) -> list[str]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.DNSName)


def _signer(leaf: x509.Certificate, bundle: bytes, now: datetime) -> str:
    """What is wrong with the CA; empty where nothing is, or none is given."""
    if not bundle:
        return ""
    try:
        authorities = x509.load_pem_x509_certificates(bundle)
    except ValueError:
        return "ca.crt is no PEM"
    for authority in authorities:
        try:
            leaf.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return "" if authority.not_valid_after_utc > now else "the CA in ca.crt has expired"
    # tls.crt may bring intermediates; only where it is the leaf alone is this certain.
    return "the CA in ca.crt did not sign tls.crt"


def _public(key: object) -> bytes:
    return key.public_bytes(  # type: ignore[attr-defined,no-any-return]
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
