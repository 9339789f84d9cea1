"""The drafter in training and in service is one function; its checkpoints are exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import TAPS, hf_model, tiny_drafter, tiny_target
from safetensors.torch import load_file, save_file

from dspark.engine.drafting import DraftEngine
from dspark.errors import CheckpointError
from dspark.models.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    fingerprint,
    load_drafter,
    save_drafter,
)
from dspark.models.drafter import DSparkDrafter
from dspark.models.target import TargetModel
from dspark.training.capture import Captured, capture
from dspark.training.teacher_forcing import force
from dspark.training.text import Conversation
from dspark.types import DraftWork, Fence, SamplingParams

TOKENS = tuple(
    int(t) for t in torch.randint(0, 32, (40,), generator=torch.Generator().manual_seed(3))
)


def captured(target: TargetModel, drafter: DSparkDrafter, tokens: tuple[int, ...]) -> Captured:
    conversation = Conversation(tokens[:1], tokens[1:], 1.0)
    return capture(target, [conversation], drafter.draft_token_ids, 512)[0]


def served_block(
    drafter: DSparkDrafter, one: Captured, anchor: int, shift: int = 0
) -> tuple[list[int], list[float]]:
    """Tokens and confidences that the draft engine gives for an anchor, in two feature chunks."""
    engine = DraftEngine(drafter, num_pages=16)
    features = drafter.feature_projection(one.taps).detach()
    greedy = SamplingParams(temperature=0.0)
    token = int(one.tokens[anchor])
    half = anchor // 2
    first = DraftWork(Fence("s", 0, 0, anchor + 1), 0, features[:half], token, 0, greedy)
    rest = DraftWork(
        Fence("s", 0, 0, anchor + 1 + shift),
        half,
        features[half : anchor + shift],
        token,
        4,
        greedy,
    )
    proposals, resyncs = engine.run([first, rest])
    assert not resyncs
    return proposals[0].token_ids.tolist(), proposals[0].confidences.tolist()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("anchor", [1, 2, 17, 33])
def test_training_and_service_agree(family: str, window: int, anchor: int) -> None:
    """Teacher-force the block that the service drew: every greedy choice must come out again."""
    target = tiny_target(family)
    drafter = tiny_drafter(target, draft_vocab=24, window=window)
    tokens, confidences = served_block(drafter, captured(target, drafter, TOKENS), anchor)
    drawn = (*TOKENS[: anchor + 1], *tokens, 0)
    with torch.no_grad():
        blocks = force(drafter, captured(target, drafter, drawn), torch.tensor([anchor]))
    assert drafter.draft_token_ids[blocks.logits.argmax(-1)].tolist() == tokens
    want = torch.sigmoid(blocks.confidence_logits)
    torch.testing.assert_close(torch.tensor(confidences), want, atol=1e-5, rtol=1e-4)


def test_many_anchors_at_once_are_each_alone() -> None:
    target = tiny_target()
    drafter = tiny_drafter(target)
    one = captured(target, drafter, TOKENS)
    with torch.no_grad():
        together = force(drafter, one, torch.tensor([4, 20, 11]))
        alone = force(drafter, one, torch.tensor([20]))
    torch.testing.assert_close(together.logits[4:8], alone.logits, atol=1e-5, rtol=1e-4)


def test_the_anchors_position_matters() -> None:
    target = tiny_target()
    drafter = tiny_drafter(target)
    one = captured(target, drafter, TOKENS)
    here, there = served_block(drafter, one, 17), served_block(drafter, one, 17, shift=1)
    assert here[1] != pytest.approx(there[1], abs=1e-4)


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


@pytest.mark.parametrize("field", ["vocab_size", "target_hidden_size"])
def test_a_drafter_of_another_target_is_refused(checkpoint: Path, field: str) -> None:
    config = json.loads((checkpoint / CONFIG_FILE).read_text())
    config["dspark"][field] += 8
    (checkpoint / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="was made for a target"):
        load_drafter(checkpoint, tiny_target())


def test_unknown_settings_are_refused(checkpoint: Path) -> None:
    config = json.loads((checkpoint / CONFIG_FILE).read_text())
    config["dspark"]["surprise"] = 1
    (checkpoint / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="surprise"):
        load_drafter(checkpoint, TargetModel(hf_model(), TAPS))
