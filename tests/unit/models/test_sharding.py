"""Parts of a target say together what the whole one says; each holds its share of it alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Lock
from typing import Any

import pytest
import torch
from helpers.steps import STEPS, Cache
from helpers.tiny import TAPS, hf_model
from transformers import GenerationConfig

from dspark.errors import CheckpointError, ConfigError
from dspark.models.sharding import Shard, check_split, load_part
from dspark.models.target import TargetModel, TargetOutput

# fp32: sums in other orders, of logits of about 4
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},  # biases that are added once
    "qwen2": {},  # of queries, keys and values alone
    "qwen3": {"tie_word_embeddings": False},  # norms of queries and keys
    "mistral": {"sliding_window": 12},
    "gemma3_text": {"sliding_window": 12, "query_pre_attn_scalar": 8},
}

FEW_STEPS = ((5, 0, 0, 17), (1, 0, 1, 2))  # where Triton is interpreted


class Parts:
    """The parts of a target, each on a thread: what they add up, they hand to each other.

    They compute one at a time, since Triton's interpreter and transformers' loader must.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._threads = ThreadPoolExecutor(size)
        self._barrier, self._turn = Barrier(size, timeout=30.0), Lock()
        self._given: list[torch.Tensor] = [torch.empty(0)] * size
        self.targets: list[TargetModel] = self.run(
            self._load, [(path, rank, size) for rank in range(size)]
        )

    def run(self, work: Callable[..., Any], of: Sequence[tuple[Any, ...]]) -> list[Any]:
        def in_turn(*arguments: Any) -> Any:
            with self._turn:
                return work(*arguments)

        futures = [self._threads.submit(in_turn, *arguments) for arguments in of]
        return [future.result() for future in futures]

    def _load(self, path: Path, rank: int, size: int) -> TargetModel:
        def add_up(tensor: torch.Tensor) -> None:
            self._given[rank] = tensor.clone()
            self._meet()
            total = torch.stack(self._given).sum(0)
            self._meet()
            tensor.copy_(total)

        model = load_part(path, rank, size, dtype=torch.float32)
        return TargetModel(model, TAPS, shard=Shard(rank, size, add_up))

    def _meet(self) -> None:
        self._turn.release()
        try:
            self._barrier.wait()
        finally:
            self._turn.acquire()


@pytest.mark.parametrize(
    ("family", "kernels"), [*((family, "reference") for family in FAMILIES), ("llama", "triton")]
)
def test_parts_say_what_the_whole_target_says(
    family: str, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("DSPARK_KERNELS", kernels)
    model = hf_model(family, vocab=64, **FAMILIES[family])
    model.save_pretrained(tmp_path, max_shard_size="20KB")  # several files
    parts, whole = Parts(tmp_path, 2), TargetModel(model, TAPS)
    assert all(part.fused == (kernels == "triton") for part in parts.targets)
    cache, caches = Cache(), [Cache(), Cache()]
    for rows in STEPS if kernels == "reference" else FEW_STEPS:
        want = cache.step(whole, rows)
        steps = [(c, t, rows) for c, t in zip(caches, parts.targets, strict=True)]
        got: list[TargetOutput] = parts.run(Cache.step, steps)
        for out in got:
            torch.testing.assert_close(out.logits, want.logits, **TOLERANCE)
            torch.testing.assert_close(out.taps, want.taps, **TOLERANCE)
    for layer in range(whole.num_layers):
        halves = [c.kv.layer(layer).keys for c in caches]  # type: ignore[attr-defined]
        assert halves[0].shape[1] == 1  # of two KV heads
        all_heads = cache.kv.layer(layer).keys  # type: ignore[attr-defined]
        torch.testing.assert_close(torch.cat(halves, dim=1), all_heads, **TOLERANCE)


def test_a_part_reads_its_share_and_how_generations_end(tmp_path: Path) -> None:
    model = hf_model(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[5, 7]).save_pretrained(tmp_path)
    part = load_part(tmp_path, 1, 2, dtype=torch.float32)
    assert part.generation_config.eos_token_id == [5, 7]
    whole = dict(model.named_parameters())
    for name, own in part.named_parameters():
        share = 2 if "_proj" in name else 1
        assert own.numel() * share == whole[name].numel(), name
    down = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(part.get_parameter(down), whole[down][:, 24:])


@pytest.mark.parametrize("size", [3, 4])
def test_sizes_that_do_not_divide_are_refused(size: int, tmp_path: Path) -> None:
    hf_model().save_pretrained(tmp_path)
    says = f"parallel is {size}, .*num_key_value_heads 2, num_attention_heads 4"
    with pytest.raises(ConfigError, match=says):
        TargetModel.load(tmp_path, tensor_parallel=size)


def test_a_family_without_such_a_plan_is_refused(tmp_path: Path) -> None:
    hf_model("phi3").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="a phi3 cannot be split: only families whose"):
        TargetModel.load(tmp_path, tensor_parallel=2)


def test_what_a_plan_says_of_embeddings_is_not_asked() -> None:
    """transformers 5.17 names them where they are tied; no part splits them here."""
    config = hf_model().config
    config.base_model_tp_plan = {**config.base_model_tp_plan, "embed_tokens": "embedding_rowwise"}
    check_split(config, 2)
    config.base_model_tp_plan = {**config.base_model_tp_plan, "layers.*.mlp.router": "colwise"}
    with pytest.raises(CheckpointError, match="cannot be split"):
        check_split(config, 2)


def test_a_tensor_that_the_plan_forgets_is_refused(tmp_path: Path) -> None:
    hf_model("cohere", use_qk_norm=True).save_pretrained(tmp_path)  # a norm of every head
    with pytest.raises(CheckpointError, match=r"cannot be split: .*k_norm.weight has shape"):
        load_part(tmp_path, 0, 2, dtype=torch.float32)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    model = hf_model()
    state = {name: t for name, t in model.state_dict().items() if "layers.1.mlp.up" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"lacks tensors \['model.layers.1.mlp.up_proj"):
        load_part(tmp_path, 0, 2, dtype=torch.float32)
