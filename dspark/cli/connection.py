"""What every command that calls a service is told: TLS by options, the API key by environment."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import typer

from dspark.errors import ConfigError

if TYPE_CHECKING:
    from dspark.rpc.client import InferenceClient
    from dspark.rpc.transport import Transport

API_KEY = "DSPARK_API_KEY"  # no option: what is on a command line, others can read

TLS_CA = typer.Option(
    "",
    envvar="DSPARK_TLS_CA",
    help="Speak TLS, and trust certificates of this authority: a PEM file, or 'public' for those "
    "that are known to all.",
)
TLS_CERT = typer.Option(
    "", envvar="DSPARK_TLS_CERT", help="Own certificate, where the other side asks: a PEM file."
)
TLS_KEY = typer.Option("", envvar="DSPARK_TLS_KEY", help="Its key: a PEM file.")
TLS_NAME = typer.Option(
    "",
    envvar="DSPARK_TLS_NAME",
    help="Name in the gateway's certificate, where it is reached by another, such as 127.0.0.1.",
)


def connect(address: str, ca: str, cert: str, key: str, name: str) -> InferenceClient:
    """A client of the gateway, by these options."""
    from dspark.rpc.client import GatewayTls, InferenceClient

    if not ca and (cert or key or name):
        raise ConfigError(
            "--tls-cert, --tls-key and --tls-name are for TLS, which --tls-ca switches on: give it"
        )
    tls = GatewayTls(ca, cert, key, name) if ca else None
    return InferenceClient(address, tls, os.environ.get(API_KEY, ""))


def service_transport(ca: str, cert: str, key: str) -> Transport:
    """How to call the services themselves, by these options."""
    from dspark.config import NetworkConfig, ServiceTls
    from dspark.rpc.transport import open_transport

    if any((ca, cert, key)) and not all((ca, cert, key)):
        raise ConfigError(
            "--tls-ca, --tls-cert and --tls-key go together here: they are the files that "
            "network.tls names to the services"
        )
    return open_transport(NetworkConfig(tls=ServiceTls(cert, key, ca)))
