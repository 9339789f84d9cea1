"""Renders the Helm chart and says what came out; each rendering is made once."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "dspark"
RELEASE, NAMESPACE = "demo", "llm"
KUBERNETES = "1.35.0"
# The profiles as their own comments tell to install them; files after each other.
PROFILES = {
    "trial": ("values-trial.yaml",),
    "l4-h100": ("values-l4-h100.yaml",),
    "production": ("values-l4-h100.yaml", "values-production.yaml"),
    "trial-production": ("values-trial.yaml", "values-production.yaml"),
}
# Values that a profile leaves to the user.
MENDED: dict[str, dict[str, Any]] = {
    "trial-production": {"modelCache": {"pvc": {"accessModes": ["ReadWriteMany"]}}},
}
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@cache
def helm() -> str:
    """helm's path, fetched if need be."""
    spec = importlib.util.spec_from_file_location("chart_tools", ROOT / "scripts/chart_tools.py")
    assert spec is not None
    assert spec.loader is not None
    tools = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tools)
    return str(tools.helm())


@dataclass(frozen=True)
class Refusal:
    """helm rendered nothing."""

    message: str


@dataclass(frozen=True)
class Rendering:
    """All objects of a release."""

    text: str

    @cached_property
    def objects(self) -> list[dict[str, Any]]:
        return [one for one in yaml.load_all(self.text, Loader) if one]  # type: ignore[arg-type]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [one for one in self.objects if one["kind"] == kind]

    @property
    def ray_service(self) -> dict[str, Any]:
        (one,) = self.of("RayService")
        return one

    @property
    def cluster(self) -> dict[str, Any]:
        return dict(self.ray_service["spec"]["rayClusterConfig"])

    @cached_property
    def serve_config(self) -> dict[str, Any]:
        loaded = yaml.load(self.ray_service["spec"]["serveConfigV2"], Loader)  # type: ignore[arg-type]
        return dict(loaded)

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """Ray's groups by name, the head among them."""
        groups = {one["groupName"]: one for one in self.cluster["workerGroupSpecs"]}
        return {"head": self.cluster["headGroupSpec"], **groups}

    @property
    def pods(self) -> dict[str, dict[str, Any]]:
        """Every pod that the release brings, as {metadata, spec}: templates, Jobs and tests."""
        pods = {f"group {name}": group["template"] for name, group in self.groups.items()}
        for one in self.objects:
            name = f"{one['kind']} {one['metadata']['name']}"
            if one["kind"] == "Pod":
                pods[name] = one
            elif "template" in one.get("spec", {}):
                pods[name] = one["spec"]["template"]
        return pods


def containers(pod: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield from pod["spec"].get("initContainers", [])
    yield from pod["spec"]["containers"]


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Values laid over each other, the last on top, as helm does it."""
    out: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
            out[key] = merged(out[key], value) if both else copy.deepcopy(value)
    return out


def at(values: Any, path: str) -> Any:
    for key in path.split("."):
        values = values[key]
    return values


def nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return dict(value)


def leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """What may be set alone: no mapping that has keys, but resources as a whole."""
    for key, value in values.items():
        inner = f"{path}.{key}" if path else key
        if isinstance(value, Mapping) and value and key not in ("resources", "labels"):
            yield from leaves(value, inner)
        else:
            yield inner, value


@cache
def defaults() -> dict[str, Any]:
    return dict(yaml.load((CHART / "values.yaml").read_text("utf-8"), Loader))  # type: ignore[arg-type]


def profile_values(profile: str) -> dict[str, Any]:
    layers = [yaml.load((CHART / name).read_text("utf-8"), Loader) for name in PROFILES[profile]]
    return merged(*layers, MENDED.get(profile, {}))


@cache
def _template(values: str, arguments: tuple[str, ...]) -> Rendering | Refusal:
    command = [helm(), "template", RELEASE, str(CHART), "--namespace", NAMESPACE]
    command += ["--kube-version", KUBERNETES, "--values", "-", *arguments]
    # json is yaml; the process gets no cluster to look at, and ends before its garbage matters.
    few = {**os.environ, "GOGC": "400"}
    ran = subprocess.run(command, input=values, capture_output=True, text=True, timeout=60, env=few)
    return Refusal(ran.stderr) if ran.returncode else Rendering(ran.stdout)


def attempt(values: Mapping[str, Any], *arguments: str) -> Rendering | Refusal:
    """`values` over the chart's own."""
    return _template(json.dumps(values), arguments)


def render(values: Mapping[str, Any], *arguments: str) -> Rendering:
    made = attempt(values, *arguments)
    assert isinstance(made, Rendering), made.message
    return made


# ---- the grid: each switch with its positions, over the trial profile ---------------------------
_PEER = [{"podSelector": {"matchLabels": {"app": "peer"}}}]
_EXTRA = {
    "env": [{"name": "EXTRA", "value": "1"}],
    "envFrom": [{"configMapRef": {"name": "extra"}}],
    "volumes": [{"name": "extra", "emptyDir": {}}],
    "volumeMounts": [{"name": "extra", "mountPath": "/extra"}],
    "labels": {"team": "a"},
    "annotations": {"example.com/a": "b"},
    "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"key": "a", "operator": "Exists"}],
    "priorityClassName": "given",
}
_GPUS = {"replica": {"gpus": 1}, "gpu": {"count": 1, "acceleratorType": "L4"}}
SWITCHES: dict[str, dict[str, dict[str, Any]]] = {
    "redis": {
        "bundled": {"redis": {"mode": "bundled"}},
        "none": {"redis": {"mode": "none"}},
        "external": {
            "redis": {
                "mode": "external",
                "existingSecret": "redis",
                "external": {
                    "host": "redis.example",
                    "username": "dspark",
                    "tls": {"enabled": True, "caSecret": "ca"},
                },
            },
            "networkPolicy": {"redis": _PEER},
        },
        "external, open": {
            "redis": {"mode": "external", "external": {"host": "redis.example"}},
            "networkPolicy": {"redis": _PEER},
        },
    },
    "cache": {
        "claim": {},
        "given claim": {"modelCache": {"pvc": {"existingClaim": "models"}}},
        "folder": {"modelCache": {"type": "hostPath"}},
        "image": {"modelCache": {"type": "image", "image": {"reference": "models:1"}}},
        "scratch": {"modelCache": {"type": "emptyDir"}},
    },
    "prefetch": {
        "on": {"modelCache": {"prefetch": {"tokenSecret": "hub"}}},
        "off": {"modelCache": {"prefetch": {"enabled": False}}},
    },
    "services' TLS": {
        "off": {},
        "secret": {"tls": {"internal": {"enabled": True, "existingSecret": "internal"}}},
        "own CA": {"tls": {"internal": {"enabled": True, "certManager": {"enabled": True}}}},
        "issuer": {
            "tls": {
                "internal": {
                    "enabled": True,
                    "certManager": {"enabled": True, "ownCa": False, "issuerRef": {"name": "i"}},
                }
            }
        },
    },
    "gRPC's TLS": {
        "off": {},
        "secret": {"tls": {"grpc": {"enabled": True, "existingSecret": "grpc"}}},
        "mutual": {
            "tls": {
                "grpc": {"enabled": True, "existingSecret": "grpc", "clientCertificates": True}
            },
            "tests": {"clientCertificateSecret": "client"},
        },
        "cert-manager": {
            "tls": {
                "grpc": {
                    "enabled": True,
                    "certManager": {
                        "enabled": True,
                        "issuerRef": {"name": "i", "kind": "ClusterIssuer"},
                        "dnsNames": ["grpc.example"],
                    },
                }
            }
        },
    },
    "HTTP's TLS": {
        "off": {},
        "on": {"tls": {"http": {"enabled": True, "existingSecret": "http"}}},
    },
    "keys": {
        "none": {},
        "secret": {"apiKeys": {"existingSecret": "keys"}, "tests": {"apiKeyClient": "t"}},
        "values": {"apiKeys": {"keys": {"t": "not-a-real-key-0123456789"}}},
    },
    "front": {
        "none": {},
        "ingress": {
            "ingress": {
                "enabled": True,
                "host": "a.example",
                "tlsSecret": "a",
                "grpc": {"enabled": True, "host": "b.example"},
            },
            "networkPolicy": {"ingressController": _PEER},
        },
        "gateway": {
            "gatewayApi": {
                "enabled": True,
                "parentRefs": [{"name": "public"}],
                "httpHostnames": ["a.example"],
            },
            "networkPolicy": {"ingressController": _PEER},
        },
        "gateway for gRPC": {
            "gatewayApi": {
                "enabled": True,
                "parentRefs": [{"name": "public", "namespace": "edge"}],
                "grpcHostnames": ["b.example"],
            },
            "networkPolicy": {"ingressController": _PEER},
        },
    },
    "scaling": {
        "fixed": {},
        "by load": {"autoscaling": {"enabled": True}},
        "no drafts": {"draftReplicas": 0},
        "no draft pool": {"pools": {"draft": {"enabled": False}}, "model": {"drafter": "none"}},
        "no autoscaler": {"autoscaler": {"enabled": False}},
    },
    "schedulers": {
        "one": {},
        "two by a Lease": {
            "schedulerReplicas": 2,
            "scheduler": {"leaderElection": "kubernetes"},
            "pools": {"gateway": {"serviceAccount": {"name": "gateways"}}},
        },
        "two by the store": {"schedulerReplicas": 2, "gatewayReplicas": 3},
        "of all pods": {"scheduler": {"kubernetes": {"namespace": "*", "enabled": "on"}}},
    },
    "devices": {
        "CPU": {},
        "GPUs": {
            "model": {"device": "cuda"},
            "pools": {"draft": _GPUS, "verifier": _GPUS},
        },
        "GPUs, spot": {
            "model": {"device": "cuda"},
            "pools": {
                "draft": {**_GPUS, "spot": {"enabled": True, "nodeSelector": {"spot": "true"}}},
                "verifier": {**_GPUS, "spot": {"enabled": True, "maxPods": 2}},
            },
        },
    },
    "monitoring": {
        "off": {},
        "on": {
            "monitoring": {
                "podMonitor": {"enabled": True, "labels": {"release": "p"}},
                "prometheusRule": {"enabled": True, "alertLabels": {"team": "a"}},
                "dashboards": {"enabled": True, "annotations": {"folder": "f"}},
            }
        },
    },
    "policies": {
        "on": {
            "networkPolicy": {
                "extra": [{"name": "x", "spec": {"podSelector": {}, "policyTypes": ["Egress"]}}]
            }
        },
        "off": {"networkPolicy": {"enabled": False}},
    },
    "RBAC": {
        "all": {},
        "own namespace": {"rbac": {"nodes": False}},
        "none": {"rbac": {"create": False}},
    },
    "tests": {"on": {}, "off": {"tests": {"enabled": False}}},
    "service": {
        "inside": {},
        "load balancer": {
            "service": {
                "type": "LoadBalancer",
                "externalTrafficPolicy": "Local",
                "loadBalancerClass": "c",
                "loadBalancerSourceRanges": ["10.0.0.0/8"],
            }
        },
        "node port": {"service": {"type": "NodePort"}},
    },
    "extras": {
        "none": {},
        "everywhere": {
            "commonLabels": {"team": "a"},
            "commonAnnotations": {"example.com/a": "b"},
            "priorityClasses": {"create": True},
            "image": {"registry": "r.example/x", "pullSecrets": [{"name": "s"}]},
            "pools": dict.fromkeys(("head", "gateway", "draft", "verifier"), _EXTRA),
            "ray": {"tokenAuth": False, "upgradeStrategy": "None"},
        },
    },
}
# Positions that the chart refuses together, each for a reason that it tells.
APART = {
    frozenset({("redis", "none"), ("schedulers", "two by the store")}),
    frozenset({("RBAC", "own namespace"), ("schedulers", "of all pods")}),
    frozenset({("front", "gateway for gRPC"), ("gRPC's TLS", "secret")}),
    frozenset({("front", "gateway for gRPC"), ("gRPC's TLS", "mutual")}),
    frozenset({("front", "gateway for gRPC"), ("gRPC's TLS", "cert-manager")}),
    frozenset({("scaling", "no autoscaler"), ("devices", "GPUs, spot")}),
}
Position = tuple[str, str]


@cache
def grid() -> dict[str, tuple[Position, ...]]:
    """Rows in which every two positions of different switches that go together meet once."""
    switches = {name: [(name, level) for level in levels] for name, levels in SWITCHES.items()}
    wanted = {
        frozenset(pair)
        for one, other in combinations(switches.values(), 2)
        for pair in ((a, b) for a in one for b in other)
        if frozenset(pair) not in APART
    }
    rows: dict[str, tuple[Position, ...]] = {}
    while wanted:
        seed = min(wanted, key=sorted)
        row = sorted(seed)
        for name, positions in switches.items():
            if any(name == taken for taken, _ in row):
                continue
            fitting = [p for p in positions if not any(frozenset({p, q}) in APART for q in row)]
            row.append(max(fitting, key=lambda p: sum(frozenset({p, q}) in wanted for q in row)))
        wanted -= {frozenset(pair) for pair in combinations(row, 2)}
        rows[f"grid-{len(rows) + 1}"] = tuple(row)
    return rows


def grid_values(row: tuple[Position, ...]) -> dict[str, Any]:
    chosen = [SWITCHES[name][level] for name, level in row]
    shared = {"modelCache": {"pvc": {"accessModes": ["ReadWriteMany"]}}}
    return merged(profile_values("trial"), shared, *chosen)


@cache
def cases() -> dict[str, dict[str, Any]]:
    """Values by name: every profile and every row of the grid."""
    rows = {name: grid_values(row) for name, row in grid().items()}
    return {**{name: profile_values(name) for name in PROFILES}, **rows}
