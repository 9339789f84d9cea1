"""The way into a cluster: a kubeconfig as kubectl finds it, or a pod's service account."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dspark.errors import ConfigError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def open_api(kubeconfig: str, context: str) -> tuple[ApiClient, str]:
    """A client, and the namespace that is meant where none is named; ConfigError without a way."""
    if find_spec("kubernetes") is None:
        raise ConfigError(
            "doctor --kube needs the package `kubernetes`: pip install 'dspark-serve[kube]'"
        )
    from kubernetes import client
    from kubernetes import config as credentials

    settings = client.Configuration()
    settings.retries = False
    in_pod = bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and (_ACCOUNT / "token").is_file()
    try:
        if in_pod and not (kubeconfig or context):
            credentials.load_incluster_config(client_configuration=settings)
            namespace = (_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
        else:
            # None: $KUBECONFIG, else ~/.kube/config
            path = os.path.expanduser(kubeconfig) or None
            credentials.load_kube_config(path, context or None, client_configuration=settings)
            contexts, active = credentials.list_kube_config_contexts(path)
            chosen = next((c for c in contexts if c["name"] == context), active)
            namespace = str(chosen["context"].get("namespace") or "default")
    except Exception as error:  # damaged files end in all sorts of them
        raise ConfigError(
            f"no way into Kubernetes: {error}; name a kubeconfig with --kubeconfig or $KUBECONFIG"
        ) from error
    return client.ApiClient(settings), namespace
