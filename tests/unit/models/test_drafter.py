"""The drafter in training and in service is one function; its checkpoints are exact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import tiny_drafter, tiny_target
from safetensors.torch import load_file, save_file

from dspark.engine.drafting import DraftEngine
from dspark.errors import CheckpointError
from dspark.kernels.attention_plan import AttentionPlan
from dspark.models.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    fingerprint,
    load_drafter,
    save_drafter,
)
from dspark.models.draft_forward import ModuleDraftForward
from dspark.models.drafter import DSparkDrafter
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetModel
from dspark.training.capture import Captured, capture
from dspark.training.teacher_forcing import force
from dspark.training.text import Conversation
from dspark.types import DraftWork, Fence, SamplingParams

TOKENS = tuple(
    int(t) for t in torch.randint(0, 32, (40,), generator=torch.Generator().manual_seed(3))
)


def captured(target: TargetModel, drafter: DSparkDrafter, *texts: tuple[int, ...]) -> Captured:
    conversations = [Conversation((), tokens, 1.0) for tokens in texts]
    return capture(target, conversations, drafter.draft_token_ids, 512)


def served_block(
    drafter: DSparkDrafter, one: Captured, anchor: int
) -> tuple[list[int], list[float]]:
    """Tokens and confidences that the draft engine gives for an anchor, in two feature chunks."""
    engine = DraftEngine(drafter, num_pages=16)
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


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("anchor", [0, 1, 2, 17, 33])
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


KINDS: dict[str, dict[str, Any]] = {
    "gated": {"head": "gated"},
    "rnn": {"head": "rnn"},
    "none": {"rank": 0},
    "no confidence": {"confidence": False},
    "fill-in": {"from_anchor": False},
    "fill-in, rnn, window": {"from_anchor": False, "head": "rnn", "window": 6},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("anchor", [0, 12, 33])
def test_training_and_service_agree_on_every_kind_of_drafter(kind: str, anchor: int) -> None:
    """After 12 rows of context, a fill-in block takes one row more than its page has."""
    target = tiny_target()
    drafter = tiny_drafter(target, draft_vocab=24, **KINDS[kind])
    tokens, confidences = served_block(drafter, captured(target, drafter, TOKENS), anchor)
    drawn = (*TOKENS[: anchor + 1], *tokens, 0)
    with torch.no_grad():
        blocks = force(drafter, captured(target, drafter, drawn), torch.tensor([anchor]))
    assert drafter.draft_token_ids[blocks.logits.argmax(-1)].tolist() == tokens
    want = torch.sigmoid(blocks.confidence_logits)
    torch.testing.assert_close(torch.tensor(confidences), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [0, 6])
def test_many_anchors_of_many_conversations_are_each_alone(window: int) -> None:
    target = tiny_target()
    drafter = tiny_drafter(target, window=window)
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


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("dspark", "surprise", 1),
        ("dspark", "block_size", 0),
        ("dspark", "mask_token_id", 99),
        ("dspark", "draft_vocab_size", 33),
        ("dspark", "markov_rank", None),
        ("dspark", "markov_rank", -1),
        ("dspark", "markov_rank", 0),  # but the confidence head wants its embedding
        ("dspark", "markov_head_type", "marble"),
        ("backbone", "model_type", None),
        ("backbone", "model_type", "no_such_model"),
        ("backbone", "hidden_size", None),
        ("backbone", "hidden_size", 48),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_name(
    checkpoint: Path, section: str, field: str, value: object
) -> None:
    """None: the field is missing."""
    config = json.loads((checkpoint / CONFIG_FILE).read_text())
    part = config["dspark"] if section == "dspark" else config
    part[field] = value
    if value is None:
        del part[field]
    (checkpoint / CONFIG_FILE).write_text(json.dumps(config))
    named = "embedding" if field == "hidden_size" and value else str(value or field)
    with pytest.raises(CheckpointError, match=field if section == "dspark" else named):
        load_drafter(checkpoint, tiny_target())


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"dspark": 3}'])
def test_a_folder_that_holds_no_drafter_is_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / CONFIG_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_drafter(checkpoint, tiny_target())
