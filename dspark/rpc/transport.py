"""How services call each other: mutual TLS where certificates are set, else plaintext."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from dspark.config import NetworkConfig
from dspark.rpc.certificates import (
    INTERNAL_NAME,
    CertificateFiles,
    Certificates,
    service_certificates,
)
from dspark.rpc.options import channel_options


class Transport:
    """Opens channels with the certificates of the moment. A channel keeps those it was made with.

    So who keeps one for long makes it anew when `generation` has changed, or when it fails.
    """

    def __init__(self, certificates: CertificateFiles | None = None) -> None:
        self.certificates = certificates

    @property
    def generation(self) -> int:
        """Rises when the certificates have changed."""
        return 0 if self.certificates is None else self.certificates.current().generation

    def channel(self, address: str) -> grpc.aio.Channel:
        """To another service at host:port, for the running event loop."""
        if self.certificates is None:
            return grpc.aio.insecure_channel(address, options=channel_options())
        credentials = _channel_credentials(self.certificates.current())
        return grpc.aio.secure_channel(address, credentials, options=_secure_options())

    def blocking_channel(self, address: str) -> grpc.Channel:
        """The same for threads."""
        if self.certificates is None:
            return grpc.insecure_channel(address, options=channel_options())
        credentials = _channel_credentials(self.certificates.current())
        return grpc.secure_channel(address, credentials, options=_secure_options())


PLAINTEXT = Transport()


def open_transport(network: NetworkConfig) -> Transport:
    """As configured; ConfigError if the certificates cannot be used."""
    return Transport(service_certificates(network.tls))


def server_credentials(files: CertificateFiles) -> grpc.ServerCredentials:
    """For a server: each new connection meets the certificates of the moment.

    Clients must show one if there is an authority for them.
    """
    offered = files.current()

    def changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal offered
        now = files.current()
        if now is offered:
            return None
        offered = now
        return _server_certificates(now)

    return grpc.dynamic_ssl_server_credentials(
        _server_certificates(offered),
        changed,
        require_client_authentication=offered.authority is not None,
    )


def _server_certificates(now: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(now.key, now.chain)], now.authority)


def _channel_credentials(now: Certificates) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(now.authority, now.key, now.chain)


def _secure_options() -> Sequence[tuple[str, int | str]]:
    return [*channel_options(), ("grpc.ssl_target_name_override", INTERNAL_NAME)]
