"""Certificates and ports: between the services, and of the public gRPC listener.

The files themselves are read where they are used (dspark/rpc/certificates.py), and again whenever
they change.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from dspark.errors import ConfigError

_PORTS = re.compile(r"([0-9]{1,5})-([0-9]{1,5})")
_LOWEST_PORT, _HIGHEST_PORT = 1024, 65535  # those below are the system's


@dataclass(frozen=True, slots=True)
class ServiceTls:
    """Mutual TLS between the services: PEM files, all three or none (docs/security.md)."""

    cert_file: str = ""  # chain of this process, its own first; carries the name dspark.internal
    key_file: str = ""
    ca_file: str = ""  # who may have issued the peers' certificates

    def __post_init__(self) -> None:
        given = [name for name in ("cert_file", "key_file", "ca_file") if getattr(self, name)]
        if given and len(given) < 3:
            raise ConfigError(
                "network.tls needs cert_file, key_file and ca_file, or none of them; got only "
                f"{' and '.join(given)}"
            )

    @property
    def enabled(self) -> bool:
        """Whether it is wanted."""
        return bool(self.cert_file)


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """What all services' connections to each other have in common."""

    # Of the servers of scheduler, verifiers and drafts, each the first that is free: "20000-20099",
    # both ends included. Empty: whatever port the system gives.
    replica_ports: str = ""
    tls: ServiceTls = field(default_factory=ServiceTls)

    def __post_init__(self) -> None:
        self.ports()

    def ports(self) -> range:
        """The ports to try in turn; port 0 alone where any will do."""
        if self.replica_ports == "":
            return range(1)
        match = _PORTS.fullmatch(str(self.replica_ports))
        if match is None:
            raise ConfigError(
                "network.replica_ports must be a range of ports such as 20000-20099, or empty for "
                f"any; got {self.replica_ports!r}"
            )
        first, last = int(match[1]), int(match[2])
        if not _LOWEST_PORT <= first <= last <= _HIGHEST_PORT:
            raise ConfigError(
                f"network.replica_ports must rise, within {_LOWEST_PORT} to {_HIGHEST_PORT}; got "
                f"{self.replica_ports!r}"
            )
        return range(first, last + 1)


@dataclass(frozen=True, slots=True)
class ClientTls:
    """TLS of the public gRPC listener: PEM files, certificate and key or neither."""

    cert_file: str = ""
    key_file: str = ""
    client_ca_file: str = ""  # set: clients must show a certificate that it issued

    def __post_init__(self) -> None:
        if bool(self.cert_file) != bool(self.key_file):
            missing = "key_file" if self.cert_file else "cert_file"
            raise ConfigError(
                "gateway.tls needs cert_file and key_file, or neither of them; got no " + missing
            )
        if self.client_ca_file and not self.cert_file:
            raise ConfigError(
                "gateway.tls.client_ca_file asks clients for certificates, which takes TLS: give "
                "cert_file and key_file too"
            )

    @property
    def enabled(self) -> bool:
        """Whether it is wanted."""
        return bool(self.cert_file)
