"""One of N equal parts of a target, as tensor parallelism cuts it (arXiv 1909.08053).

    W_q, W_k, W_v, W_gate, W_up: a share of the output;  W_o, W_down: a share of the input

A part holds its share of the heads and of the MLP, so it is a smaller model of the same family, and
is made by a configuration that says so. What W_o and W_down yield is incomplete, and is added up
over the parts. Norms, embedding and LM head are whole in each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig

from dspark.errors import CheckpointError, ConfigError
from dspark.models.target_ends import empty_target, weight_files

_ATTENTION_OUT, _MLP_OUT = "self_attn.o_proj", "mlp.down_proj"
# What transformers' own plan of a family must say, since that is what is done here.
_PLAN = {
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
    _ATTENTION_OUT: "rowwise",
    "mlp.gate_proj": "colwise",
    "mlp.up_proj": "colwise",
    _MLP_OUT: "rowwise",
}
_SHARED = ("num_key_value_heads", "num_attention_heads", "intermediate_size")
# Of the text model alone: an image encoder, which is not loaded, has layers too.
_IN_LAYER = re.compile(r"(?:model\.|language_model\.)*layers\.\d+\.(.+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a target a process runs."""

    rank: int
    size: int
    add_up: Callable[[torch.Tensor], None]  # replaces a tensor by its sum over the parts
    # Ends a sum on a device that waits for a part which is gone; what is summed means nothing then.
    let_go: Callable[[], None] = lambda: None


def check_split(config: Any, size: int) -> None:
    """ConfigError or CheckpointError unless a target of this configuration has `size` parts."""
    text = config.get_text_config()
    plan = getattr(text, "base_model_tp_plan", None) or {}
    # All parts have the norms of one head, and embeddings, which some versions name, too.
    ours = {
        name.removeprefix("layers.*."): style
        for name, style in plan.items()
        if name.startswith("layers.*.") and not style.startswith("replicated")
    }
    if ours != _PLAN or not all(isinstance(getattr(text, name, None), int) for name in _SHARED):
        raise CheckpointError(
            f"model.tensor_parallel is {size}, and a {text.model_type} cannot be split: only "
            "families whose layers have q, k, v, o, gate, up and down projections of their own, "
            "as Llama's, Qwen's, Mistral's and Gemma's, can. Set it to 1, on a GPU that holds the "
            "target"
        )
    shared = {name: getattr(text, name) for name in _SHARED}
    if any(count % size for count in shared.values()):
        has = ", ".join(f"{name} {count}" for name, count in shared.items())
        raise ConfigError(
            f"model.tensor_parallel is {size}, and the target has {has}: choose a divisor of all"
        )


def load_part(path: str | Path, rank: int, size: int, *, dtype: torch.dtype) -> Any:
    """Part `rank` of `size`, of a local folder or a hub id, on the CPU; no more is ever read.

    CheckpointError if it cannot be used.
    """
    whole = empty_target(path)
    check_split(whole.config, size)
    try:
        model, found = type(whole).from_pretrained(
            None,
            config=_config_of_part(whole.config, size),
            state_dict=_weights_of_part(path, rank, size),
            dtype=dtype,
            ignore_mismatched_sizes=True,  # to name them ourselves
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot load the target {str(path)!r}: {error}") from error
    if found["missing_keys"]:
        raise CheckpointError(
            f"the target {str(path)!r} lacks tensors {sorted(found['missing_keys'])[:8]}"
        )
    if found["mismatched_keys"]:
        name, has, wants = sorted(found["mismatched_keys"])[0]
        raise CheckpointError(
            f"the target {str(path)!r} cannot be split: {name} has shape {list(has)}, and a part "
            f"of {size} would want {list(wants)}. Set model.tensor_parallel to 1"
        )
    with suppress(OSError):  # without any, the model has made one of its configuration
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def hook_sums(model: Any, shard: Shard) -> None:
    """Have the modules add up over the parts what theirs yield alone."""

    def add_up(_module: nn.Module, _args: object, out: torch.Tensor) -> torch.Tensor:
        shard.add_up(out)
        return out

    for layer in model.get_decoder().layers:
        for name in (_ATTENTION_OUT, _MLP_OUT):
            layer.get_submodule(name).register_forward_hook(add_up)


def _config_of_part(config: Any, size: int) -> Any:
    part = deepcopy(config)
    text = part.get_text_config()
    text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for name in _SHARED:
        setattr(text, name, getattr(text, name) // size)
    return part


def _weights_of_part(path: str | Path, rank: int, size: int) -> dict[str, torch.Tensor]:
    """Tensors by their names in the files."""
    weights: dict[str, torch.Tensor] = {}
    for file in weight_files(path):
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                weights[name] = _piece(name, tensors, rank, size)
    return weights


def _piece(name: str, tensors: Any, rank: int, size: int) -> torch.Tensor:
    in_layer = _IN_LAYER.fullmatch(name)
    style = _PLAN.get(in_layer[1]) if in_layer is not None else None
    if in_layer is None or style is None:
        whole: torch.Tensor = tensors.get_tensor(name)
        return whole
    if style == "rowwise" and in_layer[2] == "bias":
        bias: torch.Tensor = tensors.get_tensor(name)
        return bias if rank == 0 else torch.zeros_like(bias)  # it is added once
    stored = tensors.get_slice(name)
    dim = 0 if style == "colwise" else 1
    share, rest = divmod(stored.get_shape()[dim], size)
    if rest:
        raise CheckpointError(
            f"{name} has shape {list(stored.get_shape())}, which has no {size} equal parts"
        )
    own = slice(rank * share, (rank + 1) * share)
    piece: torch.Tensor = stored[own] if dim == 0 else stored[:, own]
    return piece.contiguous()
