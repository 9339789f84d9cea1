"""Whether and as whom the scheduler asks Kubernetes: a pod's service account, or a kubeconfig."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.config import KubernetesConfig
from dspark.errors import ConfigError

if TYPE_CHECKING:
    from dspark.services.scheduler.kubernetes_watch import KubernetesWatch

log = logging.getLogger(__name__)

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def open_watch(config: KubernetesConfig) -> KubernetesWatch | None:
    """A watch that has begun; None where there is none to be.

    Raises ConfigError if one was asked for and cannot be. An API that does not answer is no reason.
    """
    in_pod = bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and (_ACCOUNT / "token").is_file()
    asked = config.enabled in ("on", True)
    if config.enabled in ("off", False) or not (asked or in_pod):
        return None
    try:
        return _open(config, in_pod)
    except ConfigError as error:
        if asked:
            raise
        log.warning("going on without Kubernetes: %s", error)
        return None


def _open(config: KubernetesConfig, in_pod: bool) -> KubernetesWatch:
    if find_spec("kubernetes") is None:
        raise ConfigError(
            "scheduler.kubernetes needs the package `kubernetes`: pip install 'dspark-serve[kube]'"
        )
    from kubernetes import client
    from kubernetes import config as credentials

    from dspark.services.scheduler.kubernetes_watch import KubernetesWatch
    from dspark.services.scheduler.list_watch import Waits

    settings = client.Configuration()
    settings.retries = False  # ours are spread in time
    namespace = config.namespace
    try:
        if in_pod and not config.kubeconfig:
            credentials.load_incluster_config(client_configuration=settings)
            namespace = namespace or (_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
        else:
            # None: $KUBECONFIG, else ~/.kube/config
            path = os.path.expanduser(config.kubeconfig) or None
            credentials.load_kube_config(path, client_configuration=settings)
            namespace = namespace or _context_namespace(credentials, path)
    except Exception as error:  # damaged files end in all sorts of them
        raise ConfigError(
            f"no way into Kubernetes: {error}; run in a pod with a service account, or name a "
            "kubeconfig in scheduler.kubernetes.kubeconfig"
        ) from error
    return KubernetesWatch(client.ApiClient(settings), config, namespace, Waits())


def _context_namespace(credentials: Any, path: str | None) -> str:
    _, context = credentials.list_kube_config_contexts(path)
    return str(context["context"].get("namespace") or "default")
