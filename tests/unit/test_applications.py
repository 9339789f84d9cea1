"""Serve applications: what their args and their user_config may hold, and what becomes of it."""

from __future__ import annotations

import gc
import logging
from typing import Any

import pytest
from ray.serve.exceptions import RayServeException

from dspark.applications import (
    APPLICATIONS,
    DRAFT,
    GATEWAY,
    SCHEDULER,
    VERIFIER,
    Application,
    Reconfiguring,
    check_serve_config,
    keep_loaded,
)
from dspark.config import ServeConfig, ServiceClass
from dspark.errors import ConfigError
from dspark.services.draft import app as draft
from dspark.services.gateway import app as gateway
from dspark.services.scheduler import app as scheduler
from dspark.services.verifier import app as verifier

APPS = {"scheduler": scheduler, "draft": draft, "verifier": verifier, "gateway": gateway}


@pytest.mark.parametrize("role", APPLICATIONS, ids=lambda role: role.name)
def test_an_application_reads_settings_that_there_are(role: Application) -> None:
    config = ServeConfig()
    for name in role.reads:
        assert hasattr(config, name)
    for group, keys in role.changes.items():
        assert group in role.reads
        for key in keys:
            assert hasattr(getattr(config, group), key)


@pytest.mark.parametrize("role", APPLICATIONS, ids=lambda role: role.name)
def test_every_application_is_built_of_plain_data(role: Application) -> None:
    deployment = APPS[role.name].build({"scheduler": {"heartbeat_s": 0.5}})._bound_deployment
    assert deployment.name == role.name
    (config,) = deployment.init_args
    assert config == ServeConfig(scheduler=config.scheduler)
    assert config.scheduler.heartbeat_s == 0.5
    with pytest.raises(
        RayServeException, match=f"'{role.name}' hold 'scheduling', which it does not"
    ):
        APPS[role.name].build({"scheduling": {}})


def test_replicas_are_as_many_as_the_args_say() -> None:
    assert verifier.build({"verifier_replicas": 3})._bound_deployment.num_replicas == 3
    assert draft.build({"draft_replicas": 2})._bound_deployment.num_replicas == 2
    assert gateway.build({"gateway_replicas": 2})._bound_deployment.num_replicas == 2


@pytest.mark.parametrize(
    ("role", "args", "match"),
    [
        (SCHEDULER, {"model": {"target": "x"}}, "'model', which it does not read"),
        (DRAFT, {"engine": {}}, "'engine', which it does not read"),
        (VERIFIER, {"engine": {"polcy": "off"}}, "EngineConfig has no setting 'polcy'"),
        (VERIFIER, {"engine": {"policy": False}}, "policy must be text .*got False"),
        (VERIFIER, {"engine": {"cache_tokens": 1.5}}, "cache_tokens must be a whole number"),
        (VERIFIER, {"engine": {"block_size": 65}}, "block_size must be between 0"),
        (VERIFIER, {"model": {"batch_invariant": "yes"}}, "batch_invariant must be true or false"),
        (GATEWAY, {"gateway": {"max_in_flight": "64"}}, "max_in_flight must be a whole number"),
        (GATEWAY, {"gateway": {"max_in_flight": True}}, "max_in_flight must be a whole number"),
        (GATEWAY, {"gateway": {"http_host": 1}}, "http_host must be text"),
        (GATEWAY, {"gateway": None}, "gateway must be a mapping"),
        (GATEWAY, {1: {}}, "must be a mapping"),
        (GATEWAY, ["gateway"], "args of 'gateway' must be a mapping"),
    ],
)
def test_args_that_cannot_be_are_refused_by_name(role: Application, args: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        role.configured(args)


def test_whole_numbers_may_have_become_floats() -> None:
    made = VERIFIER.configured({"engine": {"cache_tokens": 1e6}}).engine.cache_tokens
    assert (made, type(made)) == (1_000_000, int)


def test_what_user_config_leaves_out_is_as_the_args_have_it() -> None:
    start = VERIFIER.configured(
        {"engine": {"policy": "fixed", "max_requests": 4, "classes": {"a": {"weight": 2}}}}
    )
    changed = VERIFIER.changed(start, {"engine": {"classes": {"b": {"weight": 3}}}}).engine
    assert (changed.policy, changed.max_requests) == ("fixed", 4)
    assert changed.classes == {"b": ServiceClass(weight=3)}  # as a whole
    assert VERIFIER.changed(start, {}) == start


@pytest.mark.parametrize(
    ("role", "user_config", "match"),
    [
        (VERIFIER, {"engine": {"max_requests": 8}}, "engine.max_requests, which does not change"),
        (VERIFIER, {"engine": {"policy": "clever"}}, "engine: policy must be"),
        (VERIFIER, {"model": {"target": "x"}}, "model.target, which does not change"),
        (VERIFIER, {"model": {}}, "model, which does not change"),
        (VERIFIER, {"engine": "off"}, "engine, of 'verifier' must be a mapping"),
        (SCHEDULER, {"engine": {"classes": {}}}, "engine.classes, which does not change"),
        (DRAFT, {"draft": {"max_batch_works": 0}}, "max_batch_works must be at least 1"),
        (GATEWAY, {"gateway": {"grpc_port": 1}}, "What may change is gateway.max_in_flight"),
        (GATEWAY, {"gateway": {"resume_timeout_s": -1}}, "resume_timeout_s"),
        (GATEWAY, None, "user_config of 'gateway' must be a mapping"),
    ],
)
def test_a_user_config_that_cannot_be_is_refused_by_name(
    role: Application, user_config: Any, match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        role.changed(ServeConfig(), user_config)


def test_a_start_is_refused_and_a_replica_that_serves_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    starting = Reconfiguring()
    with pytest.raises(ConfigError), starting.taking():
        raise ConfigError("no such policy")
    serving = Reconfiguring()
    with serving.taking():
        pass
    with caplog.at_level(logging.ERROR), serving.taking():
        raise ConfigError("no such policy")
    assert "goes on as it was: no such policy" in caplog.text
    with pytest.raises(RuntimeError), serving.taking():
        raise RuntimeError("anything else still ends it")


def serve_config(**verifier: Any) -> dict[str, Any]:
    return {
        "applications": [
            {"name": "other", "import_path": "other.app:build", "args": {"anything": 1}},
            {"name": "v", "import_path": "dspark.services.verifier.app:build", **verifier},
        ]
    }


def test_a_serve_config_is_checked_before_it_is_deployed() -> None:
    check_serve_config(
        serve_config(
            args={"engine": {"max_requests": 4}},
            deployments=[{"name": "verifier", "user_config": {"engine": {"policy": "off"}}}],
        )
    )
    for bad, match in (
        ({"args": {"gateway": {}}}, "does not read"),
        ({"deployments": [{"name": "verifer"}]}, "options are given for 'verifer'"),
        (
            {"deployments": [{"name": "verifier", "user_config": {"draft": {}}}]},
            "draft, which does not change",
        ),
    ):
        with pytest.raises(ConfigError, match=match):
            check_serve_config(serve_config(**bad))


def test_what_a_replica_has_loaded_is_walked_by_no_collection() -> None:
    loaded = [["a model"]]
    assert any(one is loaded for one in gc.get_objects())
    try:
        keep_loaded()
        assert not any(one is loaded for one in gc.get_objects())
    finally:
        gc.unfreeze()
    assert any(one is loaded for one in gc.get_objects())
