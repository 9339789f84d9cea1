"""A process's certificate, key and authority in files that others renew while it runs.

Kubernetes renews a mounted Secret by swapping a symlink, so files are followed to what they stand
for. What was read last stays in force while the files are missing, half written or wrong.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from dspark.config import ClientTls, ServiceTls
from dspark.errors import ConfigError

log = logging.getLogger(__name__)

# The name in every service's certificate. Peers are dialled by address, which no certificate has.
INTERNAL_NAME = "dspark.internal"

_MAX_FILE_BYTES = 256 * 1024
_READS = 3  # of files that change under it
_TELL_AGAIN_S = 60.0  # that the certificate has expired
_LOOK_AGAIN_S = 1.0  # at files that could not be used, whose time or rights may come

_Stamp = tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True, slots=True)
class Certificates:
    """What the files held; all in PEM."""

    chain: bytes
    key: bytes = field(repr=False)
    authority: bytes | None  # of the peers; None: peers show no certificate
    expires_at: datetime
    generation: int  # rises with every change


class CertificateFiles:
    """Reads the files now, and again at `current` once they have changed. For any thread.

    `service`: they are for both ends between the services, so the certificate must be one that the
    authority issued, for servers and clients, and carry INTERNAL_NAME.

    Raises ConfigError if what is there at first cannot be used. The key is never logged.
    """

    def __init__(self, chain: str, key: str, authority: str = "", *, service: bool) -> None:
        self._chain, self._key = Path(chain), Path(key)
        self._authority = Path(authority) if authority else None
        self.service = service
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._expiry_told_at = 0.0
        self._refused, self._look_again_at = "", math.inf  # why the files are not in force
        self._current = self._read(1)
        log.info("certificate %s is valid until %s", chain, self._current.expires_at)

    def current(self) -> Certificates:
        """Those in force; looks whether the files have changed, which takes microseconds."""
        with self._lock:
            stamp = self._stamp()
            if stamp != self._seen or time.monotonic() >= self._look_again_at:
                self._seen = stamp
                self._renew()
            expires_at = self._current.expires_at
            if datetime.now(UTC) >= expires_at and time.monotonic() > self._expiry_told_at:
                self._expiry_told_at = time.monotonic() + _TELL_AGAIN_S
                log.error(
                    "certificate %s has expired, at %s: peers refuse it; renew the file, which is "
                    "read again by itself", self._chain, expires_at,
                )  # fmt: skip
            return self._current

    def _renew(self) -> None:
        try:
            self._current = self._read(self._current.generation + 1)
        except ConfigError as error:
            self._look_again_at = time.monotonic() + _LOOK_AGAIN_S
            if str(error) != self._refused:
                log.error(
                    "the certificates were changed and cannot be used, the last stay: %s", error
                )
            self._refused = str(error)
            return
        self._refused, self._look_again_at = "", math.inf
        self._expiry_told_at = 0.0
        log.info("read certificate %s anew: valid until %s", self._chain, self._current.expires_at)

    def _read(self, generation: int) -> Certificates:
        for _ in range(_READS):
            before = self._stamp()
            chain, key = _contents(self._chain), _contents(self._key)
            authority = None if self._authority is None else _contents(self._authority)
            if self._stamp() == before:
                break
        certificate = self._check(chain, key, authority)
        return Certificates(chain, key, authority, certificate.not_valid_after_utc, generation)

    def _check(self, chain: bytes, key: bytes, authority: bytes | None) -> x509.Certificate:
        certificate, *between = _certificates(self._chain, chain)
        issuers = []
        if self._authority is not None and authority is not None:
            issuers = _certificates(self._authority, authority)
        try:
            private = serialization.load_pem_private_key(key, None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError(
                f"{self._key} holds no private key in PEM that can be read without a password"
            ) from error
        if private.public_key() != certificate.public_key():
            raise ConfigError(
                f"the key in {self._key} is not that of the certificate {self._chain}"
            )
        now = datetime.now(UTC)
        if now >= certificate.not_valid_after_utc:
            raise ConfigError(
                f"certificate {self._chain} expired at {certificate.not_valid_after_utc}: renew it"
            )
        if now < certificate.not_valid_before_utc:
            raise ConfigError(
                f"certificate {self._chain} is valid from {certificate.not_valid_before_utc} only, "
                "and it is not so late here: check the clock"
            )
        if self.service:
            self._check_service(certificate, between, issuers)
        return certificate

    def _check_service(
        self,
        certificate: x509.Certificate,
        between: list[x509.Certificate],
        issuers: list[x509.Certificate],
    ) -> None:
        names = _names(certificate)
        if INTERNAL_NAME not in names:
            raise ConfigError(
                f"certificate {self._chain} must carry the DNS name {INTERNAL_NAME}, by which the "
                f"services know each other; it carries {', '.join(names) or 'none'}"
            )
        uses = _extension(certificate, ExtensionOID.EXTENDED_KEY_USAGE)
        both = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
        if isinstance(uses, x509.ExtendedKeyUsage) and not both <= set(uses):
            raise ConfigError(
                f"certificate {self._chain} must be for servers and for clients: issue it with the "
                "usages server auth and client auth"
            )
        if not _is_issued(certificate, between, issuers):
            raise ConfigError(
                f"certificate {self._chain} was not issued by an authority in {self._authority}: "
                "peers that trust that file would refuse it"
            )

    def _stamp(self) -> _Stamp:
        """Changes whenever a file does, or what its name stands for."""
        paths = [self._chain, self._key, self._authority]
        return tuple(_stamp(path) for path in paths if path is not None)


def service_certificates(tls: ServiceTls) -> CertificateFiles | None:
    """Those between the services; None where they are not set. Raises ConfigError."""
    if not tls.enabled:
        return None
    return CertificateFiles(tls.cert_file, tls.key_file, tls.ca_file, service=True)


def public_certificates(tls: ClientTls) -> CertificateFiles | None:
    """Those of the public listener; None where they are not set. Raises ConfigError."""
    if not tls.enabled:
        return None
    return CertificateFiles(tls.cert_file, tls.key_file, tls.client_ca_file, service=False)


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        at = os.stat(path)
    except OSError:
        return None
    return at.st_dev, at.st_ino, at.st_mtime_ns, at.st_size


def _contents(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path} is over {_MAX_FILE_BYTES} bytes: it should hold PEM text")
    return data


def _certificates(path: Path, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigError(f"{path} holds no certificates in PEM: {error}") from error


def _extension(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> object:
    try:
        return certificate.extensions.get_extension_for_oid(oid).value
    except (x509.ExtensionNotFound, ValueError):
        return None


def _names(certificate: x509.Certificate) -> list[str]:
    names = _extension(certificate, ExtensionOID.SUBJECT_ALTERNATIVE_NAME)
    if not isinstance(names, x509.SubjectAlternativeName):
        return []
    return list(names.get_values_for_type(x509.DNSName))


def _is_issued(
    certificate: x509.Certificate,
    between: list[x509.Certificate],
    issuers: list[x509.Certificate],
) -> bool:
    """Whether signatures lead from it to one of the issuers, by way of those between."""
    at: x509.Certificate | None = certificate
    for _ in range(len(between) + 1):
        if at is None:
            return False
        here = at
        if here in issuers or any(_signed(here, issuer) for issuer in issuers):
            return True
        at = next((one for one in between if one != here and _signed(here, one)), None)
    return False


def _signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True
