"""Whether Redis answers: dialled from here, or looked up where only pods could dial it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import redis

from dspark.cli.kube_doctor.findings import Finding, failed, ok, unseen
from dspark.cli.kube_doctor.objects import Denied, Listing, items, text

_TIMEOUT_S = 5.0


def shown(url: str) -> str:
    """Without user and password."""
    split = urlsplit(url)
    return urlunsplit(split._replace(netloc=split.netloc.rpartition("@")[2], query=""))


def service_of(url: str, namespace: str) -> tuple[str, str] | None:
    """(namespace, name) of the Service that a URL names; None if it names no Service."""
    parts = (urlsplit(url).hostname or "").split(".")
    if parts == [""] or parts[0] == "localhost":
        return None
    if len(parts) == 1:
        return namespace, parts[0]
    return (parts[1], parts[0]) if len(parts) == 2 or parts[2] == "svc" else None


def dial(url: str) -> Iterator[Finding]:
    """From where this runs."""
    check = "Redis"
    url, unchecked = _without_absent_ca(url)
    try:
        client = redis.Redis.from_url(
            url, socket_connect_timeout=_TIMEOUT_S, socket_timeout=_TIMEOUT_S, **unchecked
        )
    except ValueError as error:
        yield failed(check, f"{shown(url)}: {error}", "write it as redis://host:port/database")
        return
    try:
        client.ping()
    except redis.AuthenticationError:
        yield ok(check, f"{shown(url)} answers, and asks for a password")
    except redis.ResponseError as error:
        if "NOAUTH" in str(error) or "WRONGPASS" in str(error):
            yield ok(check, f"{shown(url)} answers, and asks for a password")
        else:
            yield failed(check, f"{shown(url)} answers: {error}", "see its log")
    except redis.RedisError as error:
        yield failed(
            check,
            f"{shown(url)} does not answer from here: {type(error).__name__}",
            "look at address, port, TLS (rediss://) and the network between; where only pods reach "
            "it, run this in a pod",
        )
    else:
        yield ok(check, f"{shown(url)} answers")
    finally:
        client.close()


def _without_absent_ca(url: str) -> tuple[str, dict[str, Any]]:
    """A CA that is mounted in the pods alone cannot be checked from elsewhere; all else can."""
    split = urlsplit(url)
    ca = dict(parse_qsl(split.query)).get("ssl_ca_certs")
    if not ca or Path(ca).is_file():
        return url, {}
    return urlunsplit(split._replace(query="")), {
        "ssl_cert_reqs": "none",
        "ssl_check_hostname": False,
    }


def check_service(url: str, slices: Listing, *, made: bool) -> Iterator[Finding]:
    """Of a Redis behind a Service, by its EndpointSlices; `made`: the chart brings it."""
    check = "Redis"
    if made:
        yield ok(check, f"{shown(url)} comes with the chart")
    elif isinstance(slices, Denied):
        yield unseen(check, slices)
    elif not slices:
        yield failed(
            check,
            f"{shown(url)} names no Service that is there",
            "install Redis first, or correct the address",
        )
    elif any(
        text(e, "conditions", "ready") != "False" for s in slices for e in items(s, "endpoints")
    ):
        yield ok(check, f"the Service of {shown(url)} has pods that are ready")
    else:
        yield failed(check, f"the Service of {shown(url)} has no pod that is ready", "see its pods")


def in_cluster() -> bool:
    """Whether names of Services can be resolved here."""
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST"))
