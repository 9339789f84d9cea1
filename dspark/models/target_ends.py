"""What a drafter shares with its target: the token embedding and the LM head.

A draft replica needs nothing else of the target, and its GPU may be too small for the rest, so the
two tensors are read from the target's files alone, and only when they are asked for.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.hub import cached_file

from dspark.errors import CheckpointError

_WEIGHTS = "model.safetensors"
_INDEX = _WEIGHTS + ".index.json"


class TargetEnds(Protocol):
    """A target as far as its drafters are concerned. A TargetModel is one."""

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def hidden_size(self) -> int:
        """Its own width."""

    @property
    def num_layers(self) -> int:
        """How many layers can be counted."""

    @property
    def embed_weight(self) -> torch.Tensor:
        """[V, d]."""

    @property
    def lm_head_weight(self) -> torch.Tensor:
        """[V, d]."""


class StoredEnds:
    """TargetEnds from a local folder or a hub id; CheckpointError if they are not to be found."""

    def __init__(self, path: str | Path, *, dtype: torch.dtype, device: str) -> None:
        self._path, self._dtype, self._device = str(path), dtype, device
        model = empty_target(path)
        text = model.config.get_text_config()
        self.vocab_size: int = text.vocab_size
        self.hidden_size: int = text.hidden_size
        self.num_layers: int = text.num_hidden_layers
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        self._embedding = _name_of(model, embedding)
        self._head = _name_of(model, head)
        self._tied = bool(text.tie_word_embeddings) or head.weight is embedding.weight

    @cached_property
    def embed_weight(self) -> torch.Tensor:
        """[V, d]."""
        return self._read(self._embedding)

    @cached_property
    def lm_head_weight(self) -> torch.Tensor:
        """[V, d]; the embedding's, where the target ties them."""
        return self.embed_weight if self._tied else self._read(self._head)

    def _read(self, name: str) -> torch.Tensor:
        files = self._files(name)
        for file in files:
            try:
                with safe_open(file, framework="pt", device="cpu") as tensors:
                    if name in tensors.keys():  # noqa: SIM118 - it is no mapping
                        tensor: torch.Tensor = tensors.get_tensor(name)
                        return tensor.to(self._device, self._dtype)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"cannot read {file}: {error}") from error
        looked = f"looked into {files}" if files else f"there is no {_WEIGHTS} or {_INDEX} with it"
        raise CheckpointError(f"the target {self._path!r} holds no tensor {name!r}: {looked}")

    def _files(self, name: str) -> list[str]:
        where = _weight_map(self._path)
        if where is None:
            weights = _stored_file(self._path, _WEIGHTS)
            return [] if weights is None else [weights]
        found = _stored_file(self._path, where[name]) if name in where else None
        return [] if found is None else [found]


def weight_files(path: str | Path) -> list[str]:
    """All that hold a target's weights, of a local folder or a hub id; CheckpointError if none."""
    where = _weight_map(path)
    names = [_WEIGHTS] if where is None else sorted(set(where.values()))
    found = {name: _stored_file(path, name) for name in names}
    missing = [name for name, file in found.items() if file is None]
    if missing:
        raise CheckpointError(f"there is no {', '.join(missing)} with the target {str(path)!r}")
    return [file for file in found.values() if file is not None]


def _weight_map(path: str | Path) -> dict[str, str] | None:
    """Files by the tensors that they hold; None where there is one file."""
    index = _stored_file(path, _INDEX)
    if index is None:
        return None
    try:
        where: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read {index}: {error!r}") from error
    return where


def _stored_file(path: str | Path, name: str) -> str | None:
    try:
        file: str | None = cached_file(
            str(path),
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError as error:
        raise CheckpointError(f"cannot fetch {name} of {str(path)!r}: {error}") from error
    return file


def empty_target(path: str | Path) -> Any:
    """A target's modules without their weights; CheckpointError if its configuration is no use."""
    try:
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load the target {str(path)!r}: {error}") from error


def _name_of(model: Any, module: Any) -> str:
    return next(f"{name}.weight" for name, found in model.named_modules() if found is module)
