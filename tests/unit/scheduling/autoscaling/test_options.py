"""What Ray Serve is told: a fixed count, or a policy by name with its settings."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from ray.serve.config import AutoscalingConfig as ServeAutoscaling

from dspark.config import AutoscalingConfig, DraftScaling, ModelConfig, ServeConfig, VerifierScaling
from dspark.errors import ConfigError
from dspark.scheduling.autoscaling.options import draft_options, verifier_options
from dspark.services.draft.autoscaling import DraftAutoscaling
from dspark.services.verifier.autoscaling import VerifierAutoscaling


def config(verifier: str = "pressure", draft: str = "demand") -> ServeConfig:
    return ServeConfig(
        autoscaling=AutoscalingConfig(
            enabled=True,
            interval_s=2.0,
            verifier=VerifierScaling(policy=verifier, max_replicas=3),
            draft=DraftScaling(policy=draft),
        )
    )


def test_off_means_a_fixed_count() -> None:
    off = ServeConfig(verifier_replicas=3, draft_replicas=2)
    assert verifier_options(off) == {"num_replicas": 3}
    assert draft_options(off) == {"num_replicas": 2}


def test_a_split_target_reserves_its_gpus() -> None:
    for scaling in (AutoscalingConfig(), AutoscalingConfig(enabled=True)):
        made = ServeConfig(ModelConfig(device="cuda", tensor_parallel=4), autoscaling=scaling)
        assert verifier_options(made)["ray_actor_options"] == {"num_cpus": 0, "num_gpus": 4}
        assert "ray_actor_options" not in draft_options(made)
    on_cpu = ServeConfig(ModelConfig(tensor_parallel=2))
    assert "ray_actor_options" not in verifier_options(on_cpu)


@pytest.mark.parametrize("policy", ["pressure", "forecast"])
def test_serve_takes_our_policies_with_their_settings(policy: str) -> None:
    made = ServeAutoscaling(**verifier_options(config(policy))["autoscaling_config"])
    assert (made.min_replicas, made.max_replicas, made.metrics_interval_s) == (1, 3, 2.0)
    assert made.upscale_delay_s == made.downscale_delay_s == 0.0
    kwargs = json.loads(json.dumps(made.policy.policy_kwargs))
    assert kwargs["settings"] == asdict(config(policy).autoscaling.verifier)
    # Serve imports by name and sends the class by value, so it is equal but not the same.
    assert made.policy.get_policy().__name__ == VerifierAutoscaling.__name__
    made.policy.get_policy()(**kwargs)

    made = ServeAutoscaling(**draft_options(config())["autoscaling_config"])
    assert made.policy.get_policy().__name__ == DraftAutoscaling.__name__
    made.policy.get_policy()(**made.policy.policy_kwargs)


def test_settings_that_do_not_exist_are_refused() -> None:
    settings = asdict(VerifierScaling()) | {"kv_presure": 0.5}
    with pytest.raises(ConfigError, match="kv_presure"):
        VerifierAutoscaling("tiny", 30.0, settings)


def test_an_unknown_policy_is_refused_and_one_of_the_users_own_is_not() -> None:
    with pytest.raises(ConfigError, match="pressure or forecast"):
        config(verifier="clever")
    with pytest.raises(ConfigError, match="'pressure': choose demand"):
        config(draft="pressure")
    options = verifier_options(config(verifier="my.policies:Own"))["autoscaling_config"]
    assert options["policy"]["policy_function"] == "my.policies:Own"


def test_no_more_drafts_than_settings_allow() -> None:
    assert ServeConfig(draft_replicas=2).most_drafts == 2
    scaling = AutoscalingConfig(enabled=True, draft=replace(DraftScaling(), max_replicas=0))
    assert ServeConfig(autoscaling=scaling).most_drafts == 0
