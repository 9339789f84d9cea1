"""Drafter checkpoints: a folder with config.json and model.safetensors, tensor names as published.

The folder also holds `draft_token_ids` when the draft vocabulary is reduced. Embedding and LM head
are the target's and are not stored. Every tensor must be accounted for: a missing, extra or
misshapen one is an error that names it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dspark.errors import CheckpointError
from dspark.models.drafter import DrafterConfig, DSparkDrafter, FeatureProjection
from dspark.models.target import TargetModel

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_MARK = "dspark"
_MAP = "draft_token_ids"


def save_drafter(drafter: DSparkDrafter, folder: str | Path, dtype: torch.dtype) -> None:
    """Write a checkpoint; weights first, so that a folder with a config is whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().to(dtype).contiguous() for k, v in drafter.state_dict().items()}
    tensors[_MAP] = drafter.draft_token_ids.to(torch.int32)
    partial = folder / (WEIGHTS_FILE + ".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors writes for the owner alone
    partial.replace(folder / WEIGHTS_FILE)
    settings = asdict(drafter.config)
    backbone = settings.pop("backbone")
    (folder / CONFIG_FILE).write_text(
        json.dumps({"architectures": ["DSparkDrafter"], **backbone, _MARK: settings}, indent=2)
        + "\n"
    )


def read_config(folder: str | Path) -> DrafterConfig:
    """The configuration alone; CheckpointError if there is none or it is not a drafter's."""
    path = Path(folder) / CONFIG_FILE
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no readable drafter configuration at {path}: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get(_MARK), dict):
        raise CheckpointError(f"{path} is not a drafter's: it has no {_MARK!r} section")
    settings: dict[str, Any] = raw.pop(_MARK)
    raw.pop("architectures", None)
    settings["target_layer_ids"] = tuple(settings.get("target_layer_ids", ()))
    try:
        return DrafterConfig(**settings, backbone=raw)
    except TypeError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_drafter(folder: str | Path, target: TargetModel) -> DSparkDrafter:
    """Load a drafter for `target`, in float32 and not yet prepared for inference."""
    config = read_config(folder)
    check_fits(config, target)
    tensors = _read_tensors(folder)
    ids = _draft_token_ids(tensors, config, folder)
    drafter = DSparkDrafter(config, target.embed_weight, target.lm_head_weight, ids)
    _load_exactly(drafter, tensors, folder)
    return drafter


def load_feature_projection(folder: str | Path, target: TargetModel) -> FeatureProjection:
    """The verifier's part of a drafter: fc and hidden_norm."""
    return load_drafter(folder, target).feature_projection


def fingerprint(folder: str | Path) -> str:
    """Names a drafter's exact weights, so that verifier and draft can tell that they agree."""
    digest = sha256((Path(folder) / CONFIG_FILE).read_bytes())
    digest.update((Path(folder) / WEIGHTS_FILE).read_bytes())
    return digest.hexdigest()[:16]


def check_fits(config: DrafterConfig, target: TargetModel) -> None:
    """CheckpointError, naming the field, if the drafter was made for another target."""
    for name, drafters, targets in (
        ("vocab_size", config.vocab_size, target.vocab_size),
        ("hidden_size", config.target_hidden_size, target.hidden_size),
    ):
        if drafters != targets:
            raise CheckpointError(
                f"this drafter was made for a target with {name} {drafters}; this target has "
                f"{targets}"
            )


def _read_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    path = Path(folder) / WEIGHTS_FILE
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
        return tensors
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read drafter weights {path}: {error}") from error


def _draft_token_ids(
    tensors: dict[str, torch.Tensor], config: DrafterConfig, folder: str | Path
) -> torch.Tensor:
    ids = tensors.pop(_MAP, None)
    if ids is None:
        ids = torch.arange(config.draft_vocab_size)
    ids = ids.long()
    rising = ids.numel() == config.draft_vocab_size and bool((ids.diff() > 0).all())
    if not rising or int(ids[0]) < 0 or int(ids[-1]) >= config.vocab_size:
        raise CheckpointError(
            f"{folder}: {_MAP} must hold {config.draft_vocab_size} rising token ids below "
            f"{config.vocab_size}"
        )
    return ids


def _load_exactly(
    drafter: DSparkDrafter, tensors: dict[str, torch.Tensor], folder: str | Path
) -> None:
    wanted = drafter.state_dict()
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise CheckpointError(f"{folder}: missing tensors {missing}, unexpected tensors {extra}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, the configuration says "
                f"{tuple(wanted[name].shape)}"
            )
    drafter.load_state_dict(tensors)
