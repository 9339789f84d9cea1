"""When the scheduler asks Kubernetes, as whom, and what it says if it cannot."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers.kubernetes_api import ApiServer

from dspark.config import KubernetesConfig
from dspark.errors import ConfigError
from dspark.services.scheduler import kubernetes_access
from dspark.services.scheduler.kubernetes_access import open_watch


@pytest.fixture
def server() -> Iterator[ApiServer]:
    server = ApiServer()
    yield server
    server.close()


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its service account's folder, as a pod finds it."""
    monkeypatch.setattr(kubernetes_access, "_ACCOUNT", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    (tmp_path / "token").write_text("t")
    (tmp_path / "namespace").write_text("home\n")
    return tmp_path


def kubeconfig(path: Path, url: str, namespace: str | None) -> str:
    context = {"cluster": "c", "user": "u"} | ({"namespace": namespace} if namespace else {})
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "here",
                "contexts": [{"name": "here", "context": context}],
                "clusters": [{"name": "c", "cluster": {"server": url}}],
                "users": [{"name": "u", "user": {"token": "secret"}}],
            }
        )
    )
    return str(path)


@pytest.mark.parametrize(
    ("context", "setting", "asked"),
    [(None, "", "default"), ("ours", "", "ours"), ("ours", "theirs", "theirs")],
)
def test_a_kubeconfig_says_where_and_whose(
    server: ApiServer, tmp_path: Path, context: str | None, setting: str, asked: str
) -> None:
    path = kubeconfig(tmp_path / "config", server.url, context)
    watch = open_watch(KubernetesConfig(enabled="on", kubeconfig=path, namespace=setting))
    assert watch is not None
    server.api.await_asked(lambda a: a.path == f"/api/v1/namespaces/{asked}/pods" and a.watch)
    server.api.await_asked(lambda a: a.path == "/api/v1/nodes" and a.watch)
    watch.stop()
    assert watch.join(10)


@pytest.mark.parametrize("enabled", ["auto", "off", False])
def test_outside_of_a_pod_nothing_is_asked_unless_wanted(enabled: str | bool) -> None:
    assert open_watch(KubernetesConfig(enabled=enabled)) is None


def test_off_is_off_in_a_pod_too(pod: Path) -> None:
    assert open_watch(KubernetesConfig(enabled="off")) is None


@pytest.mark.parametrize("text", [None, "", "- a list", "{", "contexts: 3"])
def test_what_was_asked_for_and_cannot_be_is_an_error(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "config"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match="no way into Kubernetes"):
        open_watch(KubernetesConfig(enabled=True, kubeconfig=str(path)))


def test_a_pod_that_may_not_ask_goes_on_unless_it_must(
    pod: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_PORT", raising=False)
    with caplog.at_level(logging.WARNING):
        assert open_watch(KubernetesConfig()) is None
    assert "going on without Kubernetes" in caplog.text
    with pytest.raises(ConfigError, match="service account"):
        open_watch(KubernetesConfig(enabled="on"))


def test_a_missing_package_is_named(pod: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_access, "find_spec", lambda name: None)
    assert open_watch(KubernetesConfig()) is None
    with pytest.raises(ConfigError, match=r"dspark-serve\[kube\]"):
        open_watch(KubernetesConfig(enabled="on"))
