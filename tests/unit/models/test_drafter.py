"""The drafter in training and in service is one function; its checkpoints are exact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import KINDS as FAMILIES
from helpers.families import drafter_of, target_of
from helpers.tiny import tiny_drafter, tiny_target
from helpers.traffic import alike
from safetensors.torch import load_file, save_file

from dspark.engine.drafting import DraftEngine
from dspark.engine.dspark_blocks import DSparkBlocks
from dspark.errors import CalibrationError, CheckpointError, ConfigError
from dspark.kernels.attention_plan import AttentionPlan
from dspark.models.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    fingerprint,
    load_drafter,
    read_calibration,
    read_config,
    save_calibration,
    save_drafter,
)
from dspark.models.draft_forward import ModuleDraftForward
from dspark.models.drafter import DSparkDrafter
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetModel
from dspark.scheduling.calibration import CalibrationTable
from dspark.training.capture import Captured, Rows, capture
from dspark.training.teacher_forcing import force
from dspark.training.text import Conversation
from dspark.types import DraftWork, Fence, SamplingParams

TOKENS = tuple(
    int(t) for t in torch.randint(0, 32, (40,), generator=torch.Generator().manual_seed(3))
)


def captured(target: TargetModel, drafter: DSparkDrafter, *texts: tuple[int, ...]) -> Captured:
    conversations = [Conversation((), tokens, 1.0) for tokens in texts]
    return capture(target, Rows.of(conversations, 512), drafter.draft_token_ids)


def served_block(
    drafter: DSparkDrafter, one: Captured, anchor: int
) -> tuple[list[int], list[float]]:
    """Tokens and confidences that the draft engine gives for an anchor, in two feature chunks."""
    engine = DraftEngine(DSparkBlocks(drafter), num_pages=16)
    features = drafter.feature_projection(one.taps).detach()
    greedy = SamplingParams(temperature=0.0)
    token = int(one.tokens[anchor])
    half = anchor // 2
    first = DraftWork(Fence("s", 0, 0, anchor + 1), 0, features[:half], token, 0, greedy)
    rest = DraftWork(
        Fence("s", 0, 0, anchor + 1),
        half,
        features[half:anchor],
        token,
        4,
        greedy,
    )
    proposals, resyncs = engine.run([first, rest])
    assert not resyncs
    return proposals[0].token_ids.tolist(), proposals[0].confidences.tolist()


def agree(target: TargetModel, drafter: DSparkDrafter, anchor: int) -> None:
    """Teacher-force the block that the service drew: every greedy choice must come out again."""
    tokens, confidences = served_block(drafter, captured(target, drafter, TOKENS), anchor)
    drawn = (*TOKENS[: anchor + 1], *tokens, 0)
    with torch.no_grad():
        blocks = force(drafter, captured(target, drafter, drawn), torch.tensor([anchor]))
    assert drafter.draft_token_ids[blocks.logits.argmax(-1)].tolist() == tokens
    want = torch.sigmoid(blocks.confidence_logits)
    torch.testing.assert_close(torch.tensor(confidences), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("anchor", [0, 1, 2, 17, 33])
def test_training_and_service_agree(family: str, window: int, anchor: int) -> None:
    target = tiny_target(family)
    agree(target, tiny_drafter(target, draft_vocab=24, window=window), anchor)


KINDS: dict[str, dict[str, Any]] = {
    "gated": {"head": "gated"},
    "rnn": {"head": "rnn"},
    "none": {"rank": 0},
    "no confidence": {"confidence": False},
    "fill-in": {"from_anchor": False},
    "fill-in, rnn, window": {"from_anchor": False, "head": "rnn", "window": 6},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("anchor", [2, 33])
def test_training_and_service_agree_in_every_family(family: str, anchor: int) -> None:
    """At the second, layers that slide do not see all."""
    agree(target_of(family), drafter_of(family), anchor)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("anchor", [0, 12, 33])
def test_training_and_service_agree_on_every_kind_of_drafter(kind: str, anchor: int) -> None:
    """After 12 rows of context, a fill-in block takes one row more than its page has."""
    target = tiny_target()
    agree(target, tiny_drafter(target, draft_vocab=24, **KINDS[kind]), anchor)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma4, mixed"])
@pytest.mark.parametrize("window", [0, 6])
def test_many_anchors_of_many_conversations_are_each_alone(family: str, window: int) -> None:
    target = target_of(family)
    drafter = drafter_of(family, window=window)
    texts = (TOKENS, TOKENS[5:19], TOKENS[::-1])
    anchors = [(0, 4), (1, 12), (2, 20), (0, 37), (1, 0)]
    starts = (0, len(TOKENS), len(TOKENS) + 14)
    with torch.no_grad():
        together = force(
            drafter,
            captured(target, drafter, *texts),
            torch.tensor([starts[text] + anchor for text, anchor in anchors]),
        )
        for i, (text, anchor) in enumerate(anchors):
            own = captured(target, drafter, texts[text])
            alone = force(drafter, own, torch.tensor([anchor]))
            rows = slice(4 * i, 4 * i + 4)
            assert together.valid[rows].tolist() == alone.valid.tolist()
            valid = alone.valid
            for got, want in (
                (together.logits, alone.logits),
                (together.confidence_logits, alone.confidence_logits),
                (together.law.probs, alone.law.probs),
                (together.law.outside, alone.law.outside),
            ):
                torch.testing.assert_close(got[rows][valid], want[valid], atol=1e-5, rtol=1e-4)


def test_a_shift_by_one_position_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Acceptance is all that suffers from it, so the agreement above has to tell."""
    target = tiny_target()
    drafter = tiny_drafter(target)
    one = captured(target, drafter, TOKENS)
    _, right = served_block(drafter, one, 17)
    hidden = ModuleDraftForward.hidden

    def shifted(
        self: ModuleDraftForward, tokens: torch.Tensor, plan: AttentionPlan, kv: PagedKVCache
    ) -> torch.Tensor:
        return hidden(self, tokens, replace(plan, positions=plan.positions + 1), kv)

    monkeypatch.setattr(ModuleDraftForward, "hidden", shifted)
    _, wrong = served_block(drafter, one, 17)
    assert wrong != pytest.approx(right, abs=1e-3)


def test_rows_past_the_end_are_not_trained_on() -> None:
    target = tiny_target()
    drafter = tiny_drafter(target)
    one = captured(target, drafter, TOKENS)
    with torch.no_grad():
        blocks = force(drafter, one, torch.tensor([len(TOKENS) - 3]))
    # the last token has no successor: rows that would predict past it are invalid
    assert blocks.valid.tolist() == [True, True, False, False]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    target = tiny_target()
    save_drafter(tiny_drafter(target, draft_vocab=24), tmp_path / "drafter", torch.float32)
    return tmp_path / "drafter"


def test_a_round_trip_is_exact(checkpoint: Path, tmp_path: Path) -> None:
    loaded = load_drafter(checkpoint, tiny_target())
    original = tiny_drafter(tiny_target(), draft_vocab=24)
    assert torch.equal(loaded.draft_token_ids, original.draft_token_ids)
    for name, tensor in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    save_drafter(loaded, tmp_path / "again", torch.float32)
    assert fingerprint(tmp_path / "again") == fingerprint(checkpoint)


def test_a_calibration_table_is_kept_for_the_drafter_that_it_is_of(checkpoint: Path) -> None:
    assert read_calibration(checkpoint, 4) is None
    name, size = fingerprint(checkpoint), read_config(checkpoint).block_size
    table = CalibrationTable(alike((1.5,) * size), size, name, 1000)
    save_calibration(checkpoint, table, 4)
    assert read_calibration(checkpoint, 4) == table
    assert fingerprint(checkpoint) == name
    longer = CalibrationTable(alike((1.5,) * (size + 1)), size + 1, name, 1000)
    with pytest.raises(CalibrationError, match=f"block size {size + 1}"):
        save_calibration(checkpoint, longer, size)
    path = checkpoint / "calibration.json"
    for bad in (longer.to_json(), table.to_json() + " " * 100_000, "{}", table.to_json()[1:]):
        path.write_text(bad)
        with pytest.raises(CalibrationError, match=r"calibration\.json.*remove it"):
            read_calibration(checkpoint, 4)
    save_drafter(load_drafter(checkpoint, tiny_target()), checkpoint, torch.float32)
    assert read_calibration(checkpoint, 4) is None


def test_every_tensor_is_accounted_for(checkpoint: Path) -> None:
    target, path = tiny_target(), checkpoint / WEIGHTS_FILE
    whole = load_file(path)

    def refused(tensors: dict[str, torch.Tensor], match: str) -> None:
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=match):
            load_drafter(checkpoint, target)

    refused({k: v for k, v in whole.items() if k != "fc.weight"}, r"missing.*fc\.weight")
    refused({**whole, "surprise": torch.zeros(1)}, r"unexpected.*surprise")
    refused({**whole, "fc.weight": torch.zeros(2, 2)}, r"fc\.weight has shape")
    refused({**whole, "draft_token_ids": torch.arange(23)}, "draft_token_ids")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot read"):
        load_drafter(checkpoint, target)


def change(folder: Path, **fields: object) -> None:
    """Fields of its configuration; None takes one away."""
    config = json.loads((folder / CONFIG_FILE).read_text()) | fields
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / CONFIG_FILE).write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"vocab_size": 40}, "vocab_size 40"),
        ({"target_hidden_size": 40}, "hidden_size 40"),
        ({"target_layer_ids": [0, 3]}, r"layers \[0, 3\].*has 3"),
        ({"hidden_size": 48}, "embedding of 32 × 48"),
    ],
)
def test_a_drafter_of_another_target_is_refused(
    checkpoint: Path, fields: dict[str, object], match: str
) -> None:
    change(checkpoint, **fields)
    with pytest.raises(CheckpointError, match=match):
        load_drafter(checkpoint, tiny_target())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_size", 0),
        ("block_size", 65),  # more than a message between draft and verifier takes
        ("block_size", "4"),
        ("block_size", None),
        ("mask_token_id", 99),
        ("mask_token_id", True),
        ("draft_vocab_size", 33),
        ("target_layer_ids", [1, 0]),
        ("target_layer_ids", [-1, 0]),
        ("target_layer_ids", []),
        ("target_layer_ids", "01"),
        ("markov_rank", None),
        ("markov_rank", -1),
        ("markov_rank", 0),  # but the confidence head wants its embedding
        ("markov_head_type", "marble"),
        ("context_window", -1),
        ("sample_from_anchor", "yes"),
        ("layer_types", ["full_attention", "sliding_attention"]),  # of no sliding_window
        ("layer_types", ["full_attention", "linear_attention"]),
        ("layer_types", ["full_attention"]),
        ("layer_types", "full_attention"),
        ("sliding_window", "wide"),
        ("final_logit_softcapping", -1.0),
        ("model_type", None),
        ("model_type", "no_such_model"),
        ("hidden_size", None),
        ("hidden_size", "wide"),
        ("max_position_embeddings", "far"),
        ("num_attention_heads", "four"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_name(
    checkpoint: Path, field: str, value: object
) -> None:
    """None: the field is missing."""
    change(checkpoint, **{field: value})
    named = str(value) if value == "no_such_model" else field
    with pytest.raises(CheckpointError, match=named):
        load_drafter(checkpoint, tiny_target())


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"block_size": 3}'])
def test_a_folder_that_holds_no_drafter_is_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / CONFIG_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_drafter(checkpoint, tiny_target())


# As DeepSpec writes it for a Qwen3 target, but for the sizes.
PUBLISHED: dict[str, object] = {
    "architectures": ["Qwen3DSparkModel"],
    "attention_bias": False,
    "block_size": 4,
    "confidence_head_with_markov": True,
    "enable_confidence_head": True,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "layer_types": ["full_attention", "full_attention"],
    "markov_head_type": "vanilla",
    "markov_rank": 8,
    "mask_token_id": 31,
    "max_position_embeddings": 512,
    "model_type": "qwen3",
    "num_anchors": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_target_layers": 3,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 50000,
    "sliding_window": None,
    "target_layer_ids": [0, 1],
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32,
}
_LAYER = (
    "input_layernorm",
    "post_attention_layernorm",
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    "self_attn.q_norm",
    "self_attn.k_norm",
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)
PUBLISHED_TENSORS = {
    *(f"layers.{n}.{name}.weight" for n in range(2) for name in _LAYER),
    *(f"{name}.weight" for name in ("embed_tokens", "lm_head", "norm", "fc", "hidden_norm")),
    *(f"markov_head.markov_w{n}.weight" for n in (1, 2)),
    "confidence_head.proj.weight",
    "confidence_head.proj.bias",
}


def published(folder: Path, **fields: object) -> DSparkDrafter:
    """Writes a checkpoint with the published names; returns what its tensors came from."""
    drafter = tiny_drafter(tiny_target("qwen3"), rope_theta=50000)
    save_drafter(drafter, folder, torch.float32, whole=True)
    (folder / CONFIG_FILE).write_text(json.dumps({**PUBLISHED, **fields}))
    return drafter


def test_published_checkpoints_are_read(tmp_path: Path) -> None:
    drafter, target = published(tmp_path), tiny_target("qwen3")
    assert load_file(tmp_path / WEIGHTS_FILE).keys() == PUBLISHED_TENSORS
    loaded = load_drafter(tmp_path, target).for_inference(torch.float32)
    one = captured(target, drafter, TOKENS)
    assert served_block(loaded, one, 20) == served_block(drafter, one, 20)
    assert loaded.rotary_emb.config.rope_parameters["rope_theta"] == 50000
    save_drafter(loaded, tmp_path / "again", torch.float32, whole=True)
    first, again = (load_file(f / WEIGHTS_FILE) for f in (tmp_path, tmp_path / "again"))
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    assert read_config(tmp_path / "again") == read_config(tmp_path)


@pytest.mark.parametrize(
    ("family", "architecture"),
    [("gemma2", "Gemma2"), ("gemma3", "Gemma3"), ("gemma4", "Gemma4"), ("gemma4, mixed", "Gemma4")],
)
def test_other_families_are_written_and_read(
    family: str, architecture: str, tmp_path: Path
) -> None:
    drafter, target = drafter_of(family), target_of(family)
    save_drafter(drafter, tmp_path, torch.float32, whole=True)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["architectures"] == [f"{architecture}DSparkModel"]
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    assert ("layers.0.layer_scalar" in tensors) == (architecture == "Gemma4")
    assert ("layers.1.self_attn.v_proj.weight" in tensors) == (family != "gemma4")
    loaded = load_drafter(tmp_path, target).for_inference(torch.float32)
    one = captured(target, drafter, TOKENS)
    assert served_block(loaded, one, 30) == served_block(drafter, one, 30)
    del tensors["layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        load_drafter(tmp_path, target)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size_per_layer_input", 8),
        ("hidden_size_per_layer_input", None),  # then the family's own default
        ("enable_moe_block", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
    ],
)
def test_what_a_gemma4_drafter_cannot_be_is_refused_by_name(
    field: str, value: object, tmp_path: Path
) -> None:
    save_drafter(drafter_of("gemma4"), tmp_path, torch.float32)
    moe = {"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8}
    change(tmp_path, **{field: value}, **(moe if field == "enable_moe_block" else {}))
    with pytest.raises(CheckpointError, match=field):
        load_drafter(tmp_path, target_of("gemma4"))


def test_a_window_narrower_than_a_block_is_refused() -> None:
    target = tiny_target("gemma2")
    with pytest.raises(CheckpointError, match="sliding_window must be at least the 5 rows"):
        tiny_drafter(target, sliding_window=4, from_anchor=False)
    tiny_drafter(target, sliding_window=4)


def test_the_checkpoints_own_embedding_and_head_are_used(tmp_path: Path) -> None:
    published(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    tensors["embed_tokens.weight"] += 1.0
    tensors["lm_head.weight"] -= 1.0
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    loaded = load_drafter(tmp_path, tiny_target("qwen3"))
    assert torch.equal(loaded.embed_weight, tensors["embed_tokens.weight"])
    assert torch.equal(loaded.head_weight, tensors["lm_head.weight"])
    save_file(tensors | {"lm_head.weight": torch.zeros(31, 32)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \(31, 32\)"):
        load_drafter(tmp_path, tiny_target("qwen3"))
    save_file(tensors | {"embed_tokens.weight": torch.tensor(1.0)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has shape \(\)"):
        load_drafter(tmp_path, tiny_target("qwen3"))


def test_dflash_checkpoints_are_read(tmp_path: Path) -> None:
    drafter = tiny_drafter(tiny_target("qwen3"), rank=0, confidence=False)
    save_drafter(drafter, tmp_path, torch.float32, whole=True)
    without = ("markov_head_type", "confidence_head_with_markov")
    fields = {name: value for name, value in PUBLISHED.items() if name not in without}
    fields |= {"markov_rank": 0, "enable_confidence_head": False, "rope_theta": 10000}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(fields))
    target = tiny_target("qwen3")
    loaded = load_drafter(tmp_path, target).for_inference(torch.float32)
    one = captured(target, drafter, TOKENS)
    assert served_block(loaded, one, 20) == served_block(drafter, one, 20)


def test_sharded_weights_are_read(tmp_path: Path) -> None:
    published(tmp_path)
    whole = load_file(tmp_path / WEIGHTS_FILE)
    (tmp_path / WEIGHTS_FILE).unlink()
    names = sorted(whole)
    where = {}
    for n, part in enumerate((names[:9], names[9:]), start=1):
        file = f"model-0000{n}-of-00002.safetensors"
        save_file({name: whole[name] for name in part}, tmp_path / file)
        where |= dict.fromkeys(part, file)
    index = tmp_path / f"{WEIGHTS_FILE}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    loaded = load_drafter(tmp_path, tiny_target("qwen3"))
    assert all(torch.equal(loaded.state_dict()[n], whole[n]) for n in loaded.state_dict())
    named = fingerprint(tmp_path)
    save_file({name: whole[name] + 1.0 for name in names[9:]}, tmp_path / file)
    assert fingerprint(tmp_path) != named
    for bad in ("../model.safetensors", "/etc/passwd", "model.bin", 3):
        index.write_text(json.dumps({"weight_map": where | {names[0]: bad}}))
        with pytest.raises(CheckpointError, match="no safetensors file beside it"):
            load_drafter(tmp_path, tiny_target("qwen3"))


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    published(tmp_path)
    (tmp_path / WEIGHTS_FILE).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*may run code"):
        load_drafter(tmp_path, tiny_target("qwen3"))


def test_a_reduced_vocabulary_is_not_saved_whole(tmp_path: Path) -> None:
    drafter = tiny_drafter(tiny_target(), draft_vocab=24)
    with pytest.raises(ConfigError, match="24 of 32 tokens"):
        save_drafter(drafter, tmp_path, torch.float32, whole=True)


def test_a_drafter_past_its_trained_length_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    target = tiny_target()
    drafter = tiny_drafter(target, max_position_embeddings=30)
    one = captured(target, drafter, TOKENS)
    served_block(drafter, one, 20)
    assert not caplog.records
    served_block(drafter, one, 33)
    (record,) = caplog.records
    assert "37 tokens is past the 30 positions" in record.getMessage()
