"""What a deployment tells Ray Serve about its replicas, by the settings. Plain data, no Ray."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dspark.config import DraftScaling, ServeConfig, VerifierScaling

_VERIFIER = "dspark.services.verifier.autoscaling:VerifierAutoscaling"
_DRAFT = "dspark.services.draft.autoscaling:DraftAutoscaling"
_WINDOW = 4  # intervals that a policy sees means over


def verifier_options(config: ServeConfig) -> dict[str, Any]:
    """For the verifier deployment's `options`."""
    options: dict[str, Any] = {"num_replicas": config.verifier_replicas}
    if config.autoscaling.enabled:
        options = _options(config, config.autoscaling.verifier, _VERIFIER)
    model = config.model
    if model.device == "cuda" and model.tensor_parallel > 1:
        # GPUs of one actor are of one node.
        options["ray_actor_options"] = {"num_cpus": 0, "num_gpus": model.tensor_parallel}
    return options


def draft_options(config: ServeConfig) -> dict[str, Any]:
    """The same for the draft deployment."""
    if not config.autoscaling.enabled:
        return {"num_replicas": config.draft_replicas}
    return _options(config, config.autoscaling.draft, _DRAFT)


def _options(
    config: ServeConfig, settings: VerifierScaling | DraftScaling, ours: str
) -> dict[str, Any]:
    interval_s, stale_after_s = config.autoscaling.interval_s, config.autoscaling.stale_after_s
    return {
        "autoscaling_config": {
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "metrics_interval_s": interval_s,
            "look_back_period_s": _WINDOW * interval_s,
            # The policy has delays of its own; a second one of Serve's would only add to them.
            "upscale_delay_s": 0.0,
            "downscale_delay_s": 0.0,
            "policy": {
                "policy_function": settings.policy if ":" in settings.policy else ours,
                "policy_kwargs": {
                    "model": config.model.target,
                    "stale_after_s": stale_after_s,
                    "settings": asdict(settings),
                },
            },
        }
    }
