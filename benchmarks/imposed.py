"""A target and a drafter of any size whose agreement is given, not trained: for timing shapes.

    python benchmarks/imposed.py --record trace.json --prompts gsm8k.jsonl mt-bench.jsonl
    python benchmarks/frontier.py --shape qwen3-8b --trace trace.json --device cuda --out frontier/

The target says the token that follows by number, whatever it computes: its layers add next to
nothing to the embedding, and row t + 1 of its LM head is the embedding of t. All its products are
done, and its answers are known. So a drafter of any weights can be made to agree with it as a
recorded drafter did with its target: a block is drafted, at its full cost, and its tokens and
confidences are then replaced by such that stand as a recorded block's did.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from gpu_step_floor import MODELS, QWEN3
from transformers import AutoConfig, AutoModelForCausalLM

from dspark.config import EngineConfig
from dspark.engine.assembly import LoadedTarget, make_verifier
from dspark.engine.draft_link import LocalDraftLink
from dspark.engine.draft_sessions import Rows
from dspark.engine.drafting import Draft, DraftEngine
from dspark.engine.dspark_blocks import DSparkBlocks
from dspark.engine.llm import LLM
from dspark.engine.verifier import VerifierEngine
from dspark.evaluation.prompts import read_prompts
from dspark.kernels.attention_plan import pages_for
from dspark.models.drafter import DrafterConfig, DSparkDrafter
from dspark.models.kv_cache import PagedKVCache
from dspark.models.target import TargetModel
from dspark.types import SamplingParams

_DAMPED = ("o_proj.weight", "down_proj.weight")  # where a layer writes into the residual stream
_HEAD_SCALE = 0.5  # the logit of what follows is √d times this, others are of about this size


@dataclass(frozen=True, slots=True)
class Trace:
    """Blocks as they were recorded: confidences, and how many tokens stood."""

    confidences: torch.Tensor  # [N, γ]
    accepted: torch.Tensor  # [N] int64

    @classmethod
    def read(cls, path: Path) -> Trace:
        """A file of {"confidences": [[…], …], "accepted": […]}."""
        raw = json.loads(path.read_text())
        return cls(torch.tensor(raw["confidences"]), torch.tensor(raw["accepted"]))

    def write(self, path: Path) -> None:
        """The same file."""
        confidences = [[round(c, 4) for c in row] for row in self.confidences.tolist()]
        path.write_text(
            json.dumps({"confidences": confidences, "accepted": self.accepted.tolist()})
        )


def counting_target(
    settings: dict[str, Any], tap_layer_ids: tuple[int, ...], device: str
) -> TargetModel:
    """A Qwen3 of these sizes, in bf16, that says t + 1 after t."""
    config = AutoConfig.for_model("qwen3", **{**settings, "tie_word_embeddings": False})
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(_DAMPED):
                weight.mul_(1e-4)
        embedding = model.get_input_embeddings().weight
        unit = torch.nn.functional.normalize(embedding.float(), dim=1)
        head = model.get_output_embeddings().weight
        head.copy_((_HEAD_SCALE * unit).roll(1, 0))
    return TargetModel(model, tap_layer_ids)


def paper_sized_drafter(target: TargetModel, taps: tuple[int, ...]) -> DSparkDrafter:
    """Random, of the shape that DeepSpec publishes for such a target: 5 layers, γ 7, rank 256."""
    own = target.config.to_dict()
    backbone = {
        key: own[key]
        for key in ("model_type", "hidden_size", "intermediate_size", "num_attention_heads",
                    "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters",
                    "max_position_embeddings", "hidden_act")
    }  # fmt: skip
    backbone["num_hidden_layers"], backbone["layer_types"] = 5, ["full_attention"] * 5
    config = DrafterConfig(
        block_size=7,
        target_layer_ids=taps,
        mask_token_id=target.vocab_size - 1,
        markov_rank=256,
        target_hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        draft_vocab_size=target.vocab_size,
        context_window=0,
        backbone=backbone,
    )
    torch.manual_seed(1)
    with torch.device(target.device):
        ids = torch.arange(target.vocab_size)
        drafter = DSparkDrafter(config, target.embed_weight, target.lm_head_weight, ids)
    return drafter.for_inference(torch.bfloat16, str(target.device))


class ImposedBlocks(DSparkBlocks):
    """A Drafter whose blocks stand as those of a trace did, for a target that counts."""

    def __init__(self, drafter: DSparkDrafter, trace: Trace) -> None:
        super().__init__(drafter)
        if trace.confidences.shape[1] < self.block_size:
            raise ValueError(
                f"the trace's blocks have {trace.confidences.shape[1]} tokens, and "
                f"{self.block_size} are drafted: record longer ones"
            )
        self._logits = torch.logit(trace.confidences.float(), eps=1e-6).to(self.device)
        self._accepted = trace.accepted.to(self.device)

    def draft(
        self, rows: Sequence[Rows], wanting: Sequence[Rows], kv: PagedKVCache, candidates: int
    ) -> list[Draft]:
        """See Drafter."""
        return [self._impose(draft) for draft in super().draft(rows, wanting, kv, candidates)]

    def _impose(self, draft: Draft) -> Draft:
        drawn, works = draft.drawn, draft.works
        size = drawn.tokens.shape[1]
        # The same block of the trace wherever a request stands, whatever shares its batch.
        picks = [
            crc32(f"{w.fence.session}/{w.fence.committed_len}".encode()) % len(self._accepted)
            for w in works
        ]
        host = torch.tensor([picks, [w.anchor_token_id for w in works]])
        chosen, anchors = host.to(self.device, non_blocking=True)
        steps = torch.arange(1, size + 1, device=self.device)
        right = (anchors[:, None] + steps) % self.vocab_size
        wrong = (right + 1) % self.vocab_size
        stands = steps <= self._accepted[chosen][:, None]
        imposed = replace(
            drawn,
            tokens=torch.where(stands, right, wrong),
            confidence_logits=self._logits[chosen, :size],
        )
        return replace(draft, drawn=imposed)


_TINY: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {"tiny": _TINY, **MODELS}


def imposed_verifier(shape: str, trace: Trace, config: EngineConfig, device: str) -> VerifierEngine:
    """Target and drafter of that shape in this process, ready to serve, with a step-time table."""
    if device != "cpu":
        torch.set_num_threads(1)  # as the engine has it beside a GPU
    settings = {**QWEN3, **SHAPES[shape]}
    layers = settings["num_hidden_layers"]
    taps = tuple(sorted({1, layers // 4, layers // 2, 3 * layers // 4, layers - 2} - {layers - 1}))
    target = counting_target(settings, taps, device)
    drafter = paper_sized_drafter(target, taps)
    engine = DraftEngine(ImposedBlocks(drafter, trace), pages_for(config.cache_tokens) + 1)
    engine.warm_up()
    loaded = LoadedTarget(
        target=target,
        projection=drafter.feature_projection,
        drafter_fingerprint=f"imposed-{shape}",
        block_size=drafter.config.block_size,
        context_window=0,
        calibration=None,
        eos_token_ids=(),
        drafter=f"imposed-{shape}",
    )
    return make_verifier(loaded, config, LocalDraftLink(engine))


def record(drafter: str, prompts: Sequence[str], tokens: int) -> Trace:
    """Blocks of a drafter of the built-in target, greedy, each verified to its end."""
    llm = LLM("smollm2-135m", drafter, engine=EngineConfig(policy="fixed", prompt_lookup=False))
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens)
    confidences, accepted = [], []
    for generation in llm.generate(prompts, sampling):
        steps = zip(
            generation.confidences, generation.accepted_lengths, generation.verified_lengths,
            strict=True,
        )  # fmt: skip
        for block, length, verified in steps:
            if verified == llm.block_size:
                confidences.append(block)
                accepted.append(length)
    return Trace(torch.tensor(confidences), torch.tensor(accepted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, required=True, help="where to write the trace")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="JSONL")
    parser.add_argument("--drafter", default="", help="default: the one shipped")
    parser.add_argument("--limit", type=int, default=20, help="prompts of each file")
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    prompts = [text for path in options.prompts for text in read_prompts(path)[: options.limit]]
    trace = record(options.drafter, prompts, options.tokens)
    trace.write(options.record)
    mean = 1.0 + float(trace.accepted.float().mean())
    print(f"{len(trace.accepted)} blocks, accepted length {mean:.3f}")


if __name__ == "__main__":
    main()
