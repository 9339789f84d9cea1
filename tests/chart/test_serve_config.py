"""serveConfigV2: Ray Serve's schema, its keys one by one, and our own settings."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.chart import cases, merged, profile_values, render
from pydantic import BaseModel
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    LoggingConfig,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from dspark.applications import APPLICATIONS, check_serve_config
from dspark.errors import ConfigError

every = pytest.mark.parametrize("case", cases())
POOLS = {"scheduler": "gateway", "draft": "draft", "verifier": "verifier", "gateway": "gateway"}


def unknown(model: type[BaseModel], given: dict[str, Any], where: str) -> list[str]:
    return [f"{where}.{key}" for key in given.keys() - model.model_fields.keys()]


def unknown_keys(config: dict[str, Any]) -> list[str]:
    """What Serve's schema would let through and never read."""
    wrong = unknown(ServeDeploySchema, config, "")
    wrong += unknown(HTTPOptionsSchema, config.get("http_options", {}), "http_options")
    wrong += unknown(LoggingConfig, config.get("logging_config", {}), "logging_config")
    for one in config["applications"]:
        wrong += unknown(ServeApplicationSchema, one, one["name"])
        for deployment in one["deployments"]:
            where = f"{one['name']}.deployments"
            wrong += unknown(DeploymentSchema, deployment, where)
            wrong += unknown(RayActorOptionsSchema, deployment["ray_actor_options"], where)
            if scaling := deployment.get("autoscaling_config"):
                wrong += unknown(AutoscalingConfig, scaling, where)
                AutoscalingConfig.model_validate(scaling)
    return wrong


@every
def test_serve_takes_it_and_reads_every_key(case: str) -> None:
    config = render(cases()[case]).serve_config
    ServeDeploySchema.model_validate(config)
    assert not unknown_keys(config)


def test_a_misspelt_key_would_be_found() -> None:
    config = render(cases()["trial"]).serve_config
    config = {**config, "applications": [dict(one) for one in config["applications"]]}
    config["applications"][0]["rout_prefix"] = "/"
    assert unknown_keys(config) == ["scheduler.rout_prefix"]


@every
def test_our_services_take_args_and_user_config(case: str) -> None:
    check_serve_config(render(cases()[case]).serve_config)


def test_a_misspelt_setting_would_be_found() -> None:
    config = render(cases()["trial"]).serve_config
    args = {**config["applications"][0]["args"], "sheduler_replicas": 1}
    with pytest.raises(ConfigError, match="sheduler_replicas"):
        check_serve_config({"applications": [{**config["applications"][0], "args": args}]})


@every
def test_applications_are_placed_in_their_pools(case: str) -> None:
    rendering = render(cases()[case])
    applications = {one["name"]: one for one in rendering.serve_config["applications"]}
    order = [one.name for one in APPLICATIONS]
    assert list(applications) == [name for name in order if name in applications]
    assert {"scheduler", "verifier", "gateway"} <= applications.keys()
    for name, one in applications.items():
        (deployment,) = one["deployments"]
        assert deployment["name"] == name
        assert one["route_prefix"] == ("/" if name == "gateway" else None)
        selector = deployment["ray_actor_options"]["label_selector"]
        assert selector == {"dspark.io/pool": POOLS[name]}
        groups = [g for g in rendering.groups.values() if g.get("labels") == selector]
        assert groups
        cpus = deployment["ray_actor_options"]["num_cpus"]
        for group in groups:
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            assert float(limits["cpu"]) >= cpus, f"{name} finds no place"
    assert rendering.groups["head"]["rayStartParams"]["num-cpus"] == "0"


def test_a_target_that_is_split_has_its_gpus() -> None:
    split = {"tensorParallel": 2, "replica": {"gpus": 2}, "gpu": {"count": 2}}
    rendering = render(merged(profile_values("l4-h100"), {"pools": {"verifier": split}}))
    check_serve_config(rendering.serve_config)
    applications = {one["name"]: one for one in rendering.serve_config["applications"]}
    assert applications["verifier"]["args"]["model"]["tensor_parallel"] == 2
    assert "tensor_parallel" not in applications["draft"]["args"]["model"]
    (deployment,) = applications["verifier"]["deployments"]
    assert deployment["ray_actor_options"]["num_gpus"] == 2
    container = rendering.groups["verifier"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2


@every
def test_files_that_settings_name_are_mounted(case: str) -> None:
    rendering = render(cases()[case])

    def files(values: Any) -> list[str]:
        if isinstance(values, dict):
            return [path for value in values.values() for path in files(value)]
        return [values] if isinstance(values, str) and values.startswith("/etc/dspark") else []

    for one in rendering.serve_config["applications"]:
        for group in rendering.groups.values():
            if group.get("labels") != {"dspark.io/pool": POOLS[one["name"]]}:
                continue
            mounts = group["template"]["spec"]["containers"][0]["volumeMounts"]
            folders = [mount["mountPath"] for mount in mounts]
            for path in files(one["args"]):
                assert any(path == f or path.startswith(f + "/") for f in folders), path
