"""Authorities, certificates, and folders that are swapped as Kubernetes swaps Secrets."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dspark.config import NetworkConfig, ServiceTls
from dspark.rpc.certificates import INTERNAL_NAME
from dspark.rpc.transport import Transport, open_transport

DAY = timedelta(days=1)
BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
_NUMBERS = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate with its key, in PEM."""

    chain: bytes
    key: bytes

    def channel_credentials(self, authority: Authority) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(authority.pem, self.key, self.chain)


class Authority:
    """Signs certificates; `above` makes it one between a root and its leaves."""

    def __init__(self, name: str = "authority", above: Authority | None = None) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        self._above = above
        now = datetime.now(UTC)
        self._certificate = (
            _builder(self._name, above._name if above else self._name, self._key, now + 30 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(above._key if above else self._key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def issue(
        self,
        name: str = INTERNAL_NAME,
        *,
        expires_in: timedelta = DAY,
        begins_in: timedelta = -2 * DAY,
        uses: Sequence[x509.ObjectIdentifier] = BOTH,
    ) -> Issued:
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        builder = _builder(
            _named(f"leaf {next(_NUMBERS)}"), self._name, key, now + expires_in, now + begins_in
        ).add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        if uses:
            builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        chain = builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        if self._above is not None:
            chain += self.pem
        return Issued(
            chain,
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )


class Secret:
    """A mounted Secret: names lead through `..data` to the folder of the moment."""

    def __init__(self, folder: Path, **files: bytes) -> None:
        self._folder, self._turn = folder, itertools.count()
        folder.mkdir(parents=True, exist_ok=True)
        self.swap(**files)

    def swap(self, **files: bytes) -> None:
        """Put other contents there at once; an underscore in a name stands for a dot."""
        new = self._folder / f"..{next(self._turn)}"
        new.mkdir()
        for name, data in files.items():
            (new / name.replace("_", ".")).write_bytes(data)
            link = self._folder / name.replace("_", ".")
            if not link.is_symlink():
                link.symlink_to(Path("..data") / link.name)
        for link in self._folder.iterdir():
            if not link.name.startswith("..") and not (new / link.name).exists():
                link.unlink()
        staged = self._folder / "..data_tmp"
        staged.symlink_to(new.name)
        os.replace(staged, self._folder / "..data")

    def path(self, name: str) -> str:
        return str(self._folder / name.replace("_", "."))


class ServiceSecret(Secret):
    """Certificate, key and authority of a service."""

    def __init__(self, folder: Path, issued: Issued, trusted: bytes) -> None:
        super().__init__(folder, tls_crt=issued.chain, tls_key=issued.key, ca_crt=trusted)

    def renew(self, issued: Issued, trusted: bytes) -> None:
        self.swap(tls_crt=issued.chain, tls_key=issued.key, ca_crt=trusted)

    @property
    def network(self) -> NetworkConfig:
        files = (self.path(name) for name in ("tls_crt", "tls_key", "ca_crt"))
        return NetworkConfig(tls=ServiceTls(*files))

    def transport(self) -> Transport:
        return open_transport(self.network)


def service_secret(folder: Path, authority: Authority | None = None) -> ServiceSecret:
    authority = authority or Authority()
    return ServiceSecret(folder, authority.issue(), authority.pem)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    until: datetime,
    since: datetime | None = None,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(since or until - 60 * DAY)
        .not_valid_after(until)
    )
