"""Settings from plain data: nested, checked, and nothing unknown passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark.config import (
    EngineConfig,
    ModelConfig,
    NetworkConfig,
    ServeConfig,
    ServiceTls,
    build,
    read_settings,
)
from dspark.errors import ConfigError


def test_settings_nest(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("model: {target: x, dtype: float32}\nverifier_replicas: 2\n")
    config = build(ServeConfig, read_settings(path))
    assert config == ServeConfig(model=ModelConfig("x", dtype="float32"), verifier_replicas=2)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"modle": {}}, "'modle'"),
        ({"model": {"tragte": "x"}}, "ModelConfig has no setting 'tragte'"),
        ({"model": {"dtype": "int8"}}, "int8"),
        ({"model": {"tensor_parallel": 0}}, "tensor_parallel must be at least 1; got 0"),
        ({"model": {"tensor_parallel": 2, "device": "cuda:1"}}, "device is 'cuda:1'"),
        ({"model": {"tensor_parallel": 2, "batch_invariant": True}}, "batch_invariant is true"),
        ({"engine": {"policy": "clever"}}, "clever"),
        ({"engine": {"max_requests": 0}}, "max_requests"),
        ({"scheduler": {"kubernetes": {"enabled": "maybe"}}}, "auto, on or off; got 'maybe'"),
        ({"verifier_replicas": 0}, "verifier_replicas"),
        ({"draft_replicas": -1}, "draft_replicas"),
        ({"autoscaling": True}, "autoscaling must be a mapping"),
        ({"autoscaling": {"interval_s": "5"}}, "interval_s"),
        ({"autoscaling": {"interval_s": 20.0}}, "stale_after_s"),
        ({"autoscaling": {"verifier": {"min_replicas": 0}}}, "min_replicas"),
        ({"autoscaling": {"verifier": {"max_replicas": 1.5}}}, "max_replicas"),
        ({"autoscaling": {"verifier": {"min_replicas": 3, "max_replicas": 2}}}, "max_replicas"),
        ({"autoscaling": {"verifier": {"floor_attainment": 1.0}}}, "floor_attainment"),
        ({"autoscaling": {"verifier": {"kv_presure": 0.5}}}, "kv_presure"),
        ({"autoscaling": {"draft": {"min_ratio": 2.0}}}, "max_ratio"),
        ({"autoscaling": {"draft": {"busy": float("nan")}}}, "busy"),
        ({"autoscaling": {"enabled": True}, "verifier_replicas": 2}, "autoscaling.verifier.min"),
        ({"autoscaling": {"enabled": True}, "draft_replicas": 0}, "autoscaling.draft.min"),
        ({"scheduler_replicas": 0}, "scheduler_replicas"),
        ({"scheduler_replicas": 2}, "store_url"),
        ({"scheduler": {"store_password_file": "/p"}}, "store_password_file"),
        ({"scheduler": {"leader_election": "dice"}}, "dice"),
        ({"scheduler": {"leader_lease_s": 0.0}}, "leader_lease_s"),
        ({"scheduler": {"lease_s": float("nan")}}, "lease_s"),
        ({"scheduler": {"kubernetes_lease": ""}}, "kubernetes_lease"),
        ({"scheduler": {"kubernetes_namespace": "a/b"}}, "kubernetes_namespace"),
        ({"network": {"tls": {"cert_file": "c"}}}, "got only cert_file"),
        ({"network": {"tls": {"key_file": "k", "ca_file": "a"}}}, "key_file and ca_file"),
        ({"network": {"tls": {"ca_file": 7}}}, "ca_file must be text"),
        ({"network": {"tls": {"cert": "c"}}}, "ServiceTls has no setting 'cert'"),
        ({"network": {"replica_ports": "20000"}}, "such as 20000-20099"),
        ({"network": {"replica_ports": 20000}}, "replica_ports must be text"),
        ({"network": {"replica_ports": "20000-20099 "}}, "such as 20000-20099"),
        ({"network": {"replica_ports": "20099-20000"}}, "must rise"),
        ({"network": {"replica_ports": "80-90"}}, "within 1024"),
        ({"network": {"replica_ports": "65000-65536"}}, "to 65535"),
        ({"gateway": {"tls": {"cert_file": "c"}}}, "got no key_file"),
        ({"gateway": {"tls": {"key_file": "k"}}}, "got no cert_file"),
        ({"gateway": {"tls": {"client_ca_file": "a"}}}, "takes TLS"),
        ({"gateway": {"api_keys_folder": None}}, "api_keys_folder must be text"),
        ({"gateway": {"grpc_port": 70_000}}, "grpc_port"),  # gRPC would listen at 4464
        ({"gateway": {"grpc_port": -1}}, "grpc_port"),
        ({"gateway": {"http_port": 65_536}}, "http_port"),
        ({"scheduler": {"heartbeat_s": 5.0}}, "lease_s must be at least twice heartbeat_s"),
        ({"model": {"threads": -1}}, "threads"),
        ({"engine": {"polciy": "off", 1: 2}}, "no setting 'polciy', 1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(values: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build(ServeConfig, values)


@pytest.mark.parametrize("word", ["auto", "on", "off", "true", "'on'"])
def test_kubernetes_is_switched_as_yaml_reads_it(tmp_path: Path, word: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(f"scheduler: {{kubernetes: {{enabled: {word}}}}}\n")
    build(ServeConfig, read_settings(path))


@pytest.mark.parametrize("text", ["- a\n- list\n", "a: [unclosed", "\x00"])
def test_files_that_hold_no_settings_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="settings"):
        read_settings(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_settings(tmp_path / "missing.yaml")


def test_ports_are_a_range_with_both_ends() -> None:
    assert list(NetworkConfig(replica_ports="20000-20002").ports()) == [20000, 20001, 20002]
    assert list(NetworkConfig(replica_ports="20000-20000").ports()) == [20000]
    assert list(NetworkConfig().ports()) == [0]  # whatever the system gives


def test_tls_is_on_once_its_files_are_named() -> None:
    files = {"cert_file": "c", "key_file": "k"}
    config = build(
        ServeConfig,
        {"network": {"tls": {**files, "ca_file": "a"}}, "gateway": {"tls": files}},
    )
    assert config.network.tls == ServiceTls("c", "k", "a")
    assert config.network.tls.enabled
    assert config.gateway.tls.enabled
    assert not ServeConfig().network.tls.enabled
    assert not ServeConfig().gateway.tls.enabled


def test_standbys_need_where_to_be_elected() -> None:
    for scheduler in ({"store_url": "redis://h"}, {"leader_election": "kubernetes"}):
        config = build(ServeConfig, {"scheduler_replicas": 2, "scheduler": scheduler})
        assert config.scheduler_replicas == 2


def test_defaults_are_the_same_however_made() -> None:
    assert build(EngineConfig, {}) == EngineConfig()
