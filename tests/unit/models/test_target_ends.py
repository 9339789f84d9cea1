"""A draft replica reads two tensors of its target, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import hf_model, save_models, tiny_drafter, tiny_target
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dspark.config import DraftConfig, ModelConfig
from dspark.engine.assembly import load_draft_engine
from dspark.errors import CheckpointError
from dspark.models import target_ends
from dspark.models.checkpoint import save_drafter
from dspark.models.target import TargetModel
from dspark.models.target_ends import StoredEnds

WEIGHTS = "model.safetensors"


def ends(folder: Path) -> StoredEnds:
    return StoredEnds(folder, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_they_are_the_loaded_targets(family: str, tied: bool, shard: str, tmp_path: Path) -> None:
    model = hf_model(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is (shard == "8KB")
    stored, loaded = ends(tmp_path), TargetModel.load(tmp_path, dtype=torch.float32)
    assert torch.equal(stored.embed_weight, loaded.embed_weight)
    assert torch.equal(stored.lm_head_weight, loaded.lm_head_weight)
    for name in ("vocab_size", "hidden_size", "num_layers"):
        assert getattr(stored, name) == getattr(loaded, name), name


def test_a_draft_engine_reads_only_what_its_checkpoint_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    class Watched:
        def __init__(self, *args: object, **kwargs: object) -> None:
            self._inner = safe_open(*args, **kwargs)

        def __enter__(self) -> Watched:
            self._inner.__enter__()
            return self

        def __exit__(self, *args: object) -> None:
            self._inner.__exit__(*args)

        def keys(self) -> list[str]:
            return list(self._inner.keys())

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            tensor: torch.Tensor = self._inner.get_tensor(name)
            return tensor

    monkeypatch.setattr(target_ends, "safe_open", Watched)
    target, drafter = save_models(tmp_path)
    model = ModelConfig(str(target), str(drafter), dtype="float32")
    load_draft_engine(model, DraftConfig(cache_tokens=256))
    assert read == ["model.embed_tokens.weight"], "the head is tied to it"
    read.clear()
    whole = tiny_drafter(TargetModel.load(target, dtype=torch.float32))
    save_drafter(whole, drafter, torch.float32, whole=True)
    load_draft_engine(model, DraftConfig(cache_tokens=256))
    assert read == []


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot load the target"):
        ends(tmp_path)
    hf_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.embed_tokens\.weight'"):
        _ = ends(tmp_path).embed_weight
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"there is no model\.safetensors"):
        _ = ends(tmp_path).embed_weight
    (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match=r"cannot read .*index\.json"):
        _ = ends(tmp_path).embed_weight


def test_a_target_in_memory_has_the_same_ends() -> None:
    target = tiny_target()
    assert target.num_layers == 3
