"""Drafter checkpoints: a folder with config.json and model.safetensors, laid out as DeepSpec's.

config.json is the transformers configuration of the drafter's layers and, beside it, the fields of
DrafterConfig by their published names. `embed_tokens` and `lm_head` are frozen copies of the
target's: where a checkpoint has them they are used, and where it has not, the target's are. A
reduced draft vocabulary brings its map as the tensor `draft_token_ids`. Weights may be sharded.
Checkpoints of speculators are read as well (dspark.models.speculators). calibration.json, where
there is one, holds the temperatures of the drafter's confidences.

Only safetensors are read. Every tensor must be accounted for: a missing, extra or misshapen one is
an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dspark.errors import CalibrationError, CheckpointError, ConfigError
from dspark.models.drafter import DrafterConfig, DSparkDrafter
from dspark.models.families import family
from dspark.models.speculators import deepspec_config, deepspec_tensors, is_speculators
from dspark.models.target_ends import TargetEnds
from dspark.scheduling.calibration import MAX_TABLE_BYTES, CalibrationTable

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CALIBRATION_FILE = "calibration.json"
_INDEX_FILE = WEIGHTS_FILE + ".index.json"
_MAP = "draft_token_ids"
_EMBEDDING, _LM_HEAD = "embed_tokens.weight", "lm_head.weight"
_WHOLE_NUMBERS = (
    "block_size",
    "mask_token_id",
    "markov_rank",
    "vocab_size",
    "target_hidden_size",
    "draft_vocab_size",
    "context_window",
)
_SWITCHES = ("enable_confidence_head", "confidence_head_with_markov", "sample_from_anchor")
_REQUIRED = (
    "block_size",
    "target_layer_ids",
    "mask_token_id",
    "markov_rank",
    "vocab_size",
    "hidden_size",
)
# Of the file or of training, and nothing that the layers are built from.
_ASIDE = (
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "num_anchors",
)
_CHUNK_BYTES = 1 << 22
_NUM_ANCHORS = 512  # of training; DeepSpec's own loader insists on the field


def save_drafter(
    drafter: DSparkDrafter, folder: str | Path, dtype: torch.dtype, *, whole: bool = False
) -> None:
    """Write a checkpoint; weights first, so that a folder with a config is whole.

    A calibration table of the folder's former weights is removed.

    `whole`: with embedding and LM head, for loaders that want them; ConfigError if the draft
    vocabulary is reduced, which they do not know.
    """
    config, folder = drafter.config, Path(folder)
    tensors = drafter.state_dict()
    if whole:
        if config.draft_vocab_size != config.vocab_size:
            raise ConfigError(
                f"a drafter of {config.draft_vocab_size} of {config.vocab_size} tokens cannot be "
                "saved with its LM head: train it on the whole vocabulary"
            )
        tensors |= {_EMBEDDING: drafter.embed_weight, _LM_HEAD: drafter.head_weight.clone()}
    tensors = {k: v.detach().to(dtype).contiguous() for k, v in tensors.items()}
    if config.draft_vocab_size != config.vocab_size:
        tensors[_MAP] = drafter.draft_token_ids.to(torch.int32)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CALIBRATION_FILE).unlink(missing_ok=True)
    partial = folder / (WEIGHTS_FILE + ".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors writes for the owner alone
    partial.replace(folder / WEIGHTS_FILE)
    settings = asdict(config)
    backbone = settings.pop("backbone")
    name = family(str(backbone["model_type"])).name
    settings = {
        "architectures": [f"{name}DSparkModel"],
        **backbone,
        **settings,
        "num_anchors": _NUM_ANCHORS,
        "dtype": str(dtype).removeprefix("torch."),
        **({"tie_word_embeddings": False} if whole else {}),  # Gemma's default is that they are
    }
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def read_config(folder: str | Path) -> DrafterConfig:
    """The configuration alone; CheckpointError if there is none or it is not a drafter's."""
    return _read_config(Path(folder) / CONFIG_FILE)[0]


def _read_config(path: Path) -> tuple[DrafterConfig, bool]:
    """The configuration, and whether it is speculators'."""
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no readable drafter configuration at {path}: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold an object; it holds a {type(raw).__name__}")
    foreign = is_speculators(raw)
    try:
        if foreign:
            raw = deepspec_config(raw)
        missing = [name for name in _REQUIRED if name not in raw]
        if missing:
            raise CheckpointError(f"not a DSpark or DFlash drafter's: it has no {missing}")
        return _drafter_config(raw), foreign
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _drafter_config(raw: dict[str, Any]) -> DrafterConfig:
    raw = {name: value for name, value in raw.items() if name not in _ASIDE}
    raw.setdefault("target_hidden_size", raw["hidden_size"])
    raw.setdefault("draft_vocab_size", raw["vocab_size"])
    raw.setdefault("context_window", 0)
    shape: list[str] = [name for name in ("hidden_size", "max_position_embeddings") if name in raw]
    if raw.get("sliding_window") is not None:
        shape.append("sliding_window")
    for name in (*_WHOLE_NUMBERS, *shape):
        if type(raw[name]) is not int:
            raise CheckpointError(f"{name} must be a whole number; got {raw[name]!r}")
    settings: dict[str, Any] = {name: raw.pop(name) for name in _WHOLE_NUMBERS}
    if settings["markov_rank"]:
        raw.setdefault("markov_head_type", "vanilla")
    else:
        raw["markov_head_type"] = "vanilla"  # of no head
        raw.setdefault("confidence_head_with_markov", False)
    for name in _SWITCHES:
        value = raw.pop(name, True)
        if type(value) is not bool:
            raise CheckpointError(f"{name} must be true or false; got {value!r}")
        settings[name] = value
    layers = raw.pop("target_layer_ids")
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise CheckpointError(f"target_layer_ids must be whole numbers; got {layers!r}")
    return DrafterConfig(
        target_layer_ids=tuple(layers),
        markov_head_type=str(raw.pop("markov_head_type")),
        backbone=raw,
        **settings,
    )


def load_drafter(folder: str | Path, target: TargetEnds) -> DSparkDrafter:
    """Load a drafter for `target`, in float32 and not yet prepared for inference."""
    config, foreign = _read_config(Path(folder) / CONFIG_FILE)
    check_fits(config, target)
    tensors = _read_tensors(Path(folder))
    if foreign:
        try:
            tensors = deepspec_tensors(tensors, config.vocab_size, config.draft_vocab_size)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error
    ids = _draft_token_ids(tensors, config, folder)
    drafter = DSparkDrafter(
        config,
        _frozen(tensors, _EMBEDDING, config, folder, lambda: target.embed_weight),
        _frozen(tensors, _LM_HEAD, config, folder, lambda: target.lm_head_weight),
        ids,
    )
    _load_exactly(drafter, tensors, folder)
    return drafter


def stored_dtype(folder: str | Path) -> torch.dtype:
    """The type that a checkpoint's weights have; CheckpointError if they have several."""
    found = {t.dtype for t in _read_tensors(Path(folder)).values() if t.is_floating_point()}
    if len(found) != 1:
        raise CheckpointError(f"{folder}: weights are of the types {sorted(map(str, found))}")
    return found.pop()


def fingerprint(folder: str | Path) -> str:
    """Names a drafter's exact weights, so that verifier and draft can tell that they agree.

    CheckpointError if a file of theirs cannot be read.
    """
    digest = sha256()
    try:
        for path in (Path(folder) / CONFIG_FILE, *_weight_files(Path(folder))):
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"cannot read the drafter in {folder}: {error}") from error
    return digest.hexdigest()[:16]


def save_calibration(folder: str | Path, table: CalibrationTable, block_size: int) -> None:
    """Put a table beside the weights; CalibrationError if it is not of this drafter and γ."""
    table.check_fits(block_size, fingerprint(folder))
    partial = Path(folder) / (CALIBRATION_FILE + ".partial")
    partial.write_text(table.to_json() + "\n")
    partial.replace(Path(folder) / CALIBRATION_FILE)


def read_calibration(folder: str | Path, block_size: int) -> CalibrationTable | None:
    """The table beside the weights, if any; CalibrationError if it is not of this drafter and γ."""
    path = Path(folder) / CALIBRATION_FILE
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            table = CalibrationTable.from_json(file.read(MAX_TABLE_BYTES + 1))
        table.check_fits(block_size, fingerprint(folder))
    except (OSError, CalibrationError) as error:
        raise CalibrationError(f"{path}: {error}; or remove it, to draft uncalibrated") from error
    return table


def check_fits(config: DrafterConfig, target: TargetEnds) -> None:
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
    if max(config.target_layer_ids) >= target.num_layers:
        raise CheckpointError(
            f"this drafter reads target layers {list(config.target_layer_ids)} (target_layer_ids); "
            f"this target has {target.num_layers}, counted from 0"
        )


def _weight_files(folder: Path) -> list[Path]:
    if not (folder / _INDEX_FILE).exists():
        return [folder / WEIGHTS_FILE]
    try:
        names = set(json.loads((folder / _INDEX_FILE).read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"cannot read {folder / _INDEX_FILE}: {error!r}") from error
    for name in names:
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
        ):
            raise CheckpointError(
                f"{folder / _INDEX_FILE} names {name!r}, which is no safetensors file beside it"
            )
    return [folder / name for name in sorted(names)]


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in _weight_files(folder):
        if not path.exists():
            others = sorted(p.name for p in folder.glob("*.bin")) + sorted(
                p.name for p in folder.glob("*.pt")
            )
            found = f"; {others} may run code when loaded, and are not read" if others else ""
            raise CheckpointError(f"there are no drafter weights at {path}{found}")
        try:
            tensors |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read drafter weights {path}: {error}") from error
    return tensors


def _frozen(
    tensors: dict[str, torch.Tensor],
    name: str,
    config: DrafterConfig,
    folder: str | Path,
    targets: Callable[[], torch.Tensor],  # [V, d]
) -> torch.Tensor:  # [V, d]; an LM head may be [V_d, d]
    """The checkpoint's copy of a target's tensor, or the target's own."""
    copy = tensors.pop(name, None)
    if copy is None:
        return targets()
    rows = {config.vocab_size} | ({config.draft_vocab_size} if name == _LM_HEAD else set())
    shapes = [(count, config.hidden_size) for count in sorted(rows)]
    if tuple(copy.shape) not in shapes:
        raise CheckpointError(
            f"{folder}: {name} has shape {tuple(copy.shape)}, the configuration says "
            f"{' or '.join(map(str, shapes))}"
        )
    return copy


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
