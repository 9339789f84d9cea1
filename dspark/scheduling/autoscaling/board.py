"""Where the verifiers' policy leaves what the draft replicas' policy has to know.

Ray Serve shows a policy its own deployment alone; both only if they share an application whose
policy is given in a configuration file, which `serve.run` cannot. But it runs all policies in one
process, its controller. It pickles their modules by value and imports this one, so that they meet
here. Were they ever apart, the draft policy would hear nothing, and leave all as it is.
"""

from __future__ import annotations

from dspark.scheduling.autoscaling.policies import VerifierView

_views: dict[str, VerifierView] = {}  # by model


def post(model: str, view: VerifierView) -> None:
    """Leave the latest view of a model's verifiers."""
    _views[model] = view


def latest(model: str) -> VerifierView | None:
    """What was left, if anything; its age is the reader's to judge."""
    return _views.get(model)
