"""The drafter at work: context into pages, blocks over them (paper §3.1).

A block is a sequence's newest rows, as the target's are, only that they see each other: the same
plan, the same pages and the same attention serve both. Keys and values of the masked rows go to
the slots that their positions have, and the features of what was committed overwrite them later.

Three ways with one contract: the family's own modules (any device and type), the C++ operators,
and the Triton kernels.

Symbols as in dspark.models.drafter; N rows of context, T rows of blocks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

from dspark.decoding.drawing import DrawnBlocks, DrawRules, draw
from dspark.kernels.attention_plan import AttentionPlan, RowPlan
from dspark.kernels.cpu import operators
from dspark.kernels.dispatch import TRITON_TYPES, has_triton
from dspark.kernels.transfer import to_device
from dspark.models.captured_context import CapturedContext
from dspark.models.captured_draw import CapturedDraw
from dspark.models.drafter import DSparkDrafter
from dspark.models.fused import FAMILIES, FusedLayers
from dspark.models.graphs import KERNELS, PaddedSteps
from dspark.models.kv_cache import PagedKVCache
from dspark.models.packed_linear import PackedLinear, can_pack, pack_linears
from dspark.models.sequential_head import MarkovHead
from dspark.models.target import ATTENTION_NAME, register_attention
from dspark.models.triton_layers import TritonLayers, product

if TYPE_CHECKING:
    from dspark.kernels.triton.draft_head import DraftHead

_MOST_CANDIDATES = 64  # that the Triton kernels serve


class DraftForward(Protocol):
    """A drafter that is ready for inference."""

    def write_context(
        self,
        features: torch.Tensor,  # [N, d]
        positions: torch.Tensor,  # [N] on the host
        slots: torch.Tensor,  # [N] on the host
        kv: PagedKVCache,
    ) -> None:
        """Keys and values of context features to their slots, in every layer."""

    def hidden(
        self,
        tokens: torch.Tensor,  # [T] anchors and masks, on the host
        plan: AttentionPlan,
        kv: PagedKVCache,
    ) -> torch.Tensor:  # [T, d]
        """Backbone hidden states h, final norm applied."""

    def draw(
        self,
        hidden: torch.Tensor,  # [S, γ, d]
        anchors: torch.Tensor,  # [S] on the host
        rules: DrawRules,  # on the host
        candidates: int,  # K
    ) -> DrawnBlocks:
        """Left to right: bias, confidence, draw."""

    def warm_up(self, kv: PagedKVCache, window: int | None, candidates: int) -> None:
        """On a GPU: capture what is captured, for whole blocks, before anybody waits for it.

        `window`: of the blocks' plans.
        """


def draft_forward(drafter: DSparkDrafter) -> DraftForward:
    """The fastest way to run a frozen drafter as it is: type, device, family."""
    if FusedDraftForward.fits(drafter):
        return FusedDraftForward(drafter)
    if TritonDraftForward.fits(drafter):
        return TritonDraftForward(drafter)
    return ModuleDraftForward(drafter)


class ModuleDraftForward:
    """The backbone's own modules, and torch."""

    def __init__(self, drafter: DSparkDrafter) -> None:
        self._drafter = drafter
        register_attention()
        weight = drafter.head_weight.to(drafter.norm.weight.dtype)
        self._head: Any = lambda hidden: F.linear(hidden, weight)
        self._kernels: CapturedDraw | None = None
        if has_triton(weight.device) and weight.dtype in TRITON_TYPES:
            self._draft_head = _draft_head(drafter)
            self._kernels = CapturedDraw(
                self._draw_by_kernels, weight.device, capture=weight.device.type == "cuda"
            )
        elif can_pack(weight.dtype, weight.device):
            self._head = PackedLinear.of(weight)
            pack_linears(drafter.layers)
            pack_linears(drafter.markov_head)

    def write_context(
        self,
        features: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        kv: PagedKVCache,
    ) -> None:
        """See DraftForward."""
        positions, slots = to_device([positions, slots], features.device)
        for layer, (keys, values) in enumerate(self._drafter.context_kv(features, positions)):
            kv.write(layer, keys.transpose(0, 1), values.transpose(0, 1), slots)

    def hidden(self, tokens: torch.Tensor, plan: AttentionPlan, kv: PagedKVCache) -> torch.Tensor:
        """See DraftForward."""
        drafter = self._drafter
        (tokens,) = plan.move(tokens)
        drafter.use_attention(ATTENTION_NAME)
        x = drafter.embed(tokens[None])
        turns = drafter.rotary(x, plan.placed.positions[None])
        for layer, turn in zip(drafter.layers, turns, strict=True):
            x = layer(
                x,
                attention_mask=None,
                position_embeddings=turn,
                use_cache=False,
                dspark_plan=plan,
                dspark_kv=kv,
                dspark_windows=drafter.windows,
            )
        out: torch.Tensor = drafter.norm(x)[0]
        return out

    def draw(
        self, hidden: torch.Tensor, anchors: torch.Tensor, rules: DrawRules, candidates: int
    ) -> DrawnBlocks:
        """See DraftForward."""
        if self._kernels is not None and candidates <= _MOST_CANDIDATES:
            return self._kernels.run(hidden, anchors, rules, candidates)
        present = rules.present()
        anchors, *placed = to_device([anchors, *rules.tensors], hidden.device)
        rules = DrawRules(*placed)
        head, vocabulary = self._drafter.markov_head, self._drafter.draft_token_ids
        base = self._drafter.cap(self._head(hidden))
        previous, state = anchors, head.first_state(len(anchors))
        tokens, scores, ids, probs = [], [], [], []
        for k in range(base.shape[1]):
            embedded = head.embed(previous)
            code, state = head.step(embedded, hidden[:, k], state)
            logits = base[:, k] + head.bias(code)
            scores.append(self._drafter.confidence_logits(hidden[:, k], embedded, logits))
            previous, law_ids, law_probs = draw(logits, vocabulary, rules, present, k, candidates)
            tokens.append(previous)
            ids.append(law_ids)
            probs.append(law_probs)
        return DrawnBlocks(
            tokens=torch.stack(tokens, 1),
            confidence_logits=torch.stack(scores, 1).float(),
            candidate_ids=torch.stack(ids, 1),
            candidate_probs=torch.stack(probs, 1),
        )

    def warm_up(self, kv: PagedKVCache, window: int | None, candidates: int) -> None:
        """See DraftForward."""
        if self._kernels is not None:
            config, like = self._drafter.config, self._drafter.norm.weight
            hidden = like.new_zeros(1, config.block_size, config.hidden_size)
            self._kernels.warm_up(hidden, candidates)

    def _draw_by_kernels(
        self,
        hidden: torch.Tensor,
        anchors: torch.Tensor,
        rules: DrawRules,  # on the device
        candidates: int,
        greedy: bool,  # all of them
    ) -> DrawnBlocks:
        from dspark.kernels.triton.draft_head import draw_blocks

        base = self._drafter.cap(self._head(hidden))
        return draw_blocks(
            base, hidden, anchors, self._draft_head, rules, candidates, greedy=greedy
        )


class TritonDraftForward(ModuleDraftForward):
    """The Triton kernels, in padded shapes, captured on a GPU, up to some hundred rows."""

    def __init__(self, drafter: DSparkDrafter) -> None:
        """Makes views of the drafter's weights."""
        super().__init__(drafter)
        weight = drafter.norm.weight
        config = drafter.layers[0].self_attn.config
        self._layers = TritonLayers(
            config,
            drafter.layers,
            drafter.rotary_emb,
            linear=product(weight.device, weight.dtype),
        )
        self._eps: float = config.rms_norm_eps
        on_cuda = weight.device.type == "cuda"
        self._context = CapturedContext(self._layers.write_context, weight.device, capture=on_cuda)
        self._padded = PaddedSteps(self._run, weight.device, capture=on_cuda, padding=KERNELS)

    @staticmethod
    def fits(drafter: DSparkDrafter) -> bool:
        """Whether the kernels compute what this drafter's modules do."""
        config, weight = drafter.layers[0].self_attn.config, drafter.norm.weight
        return config.model_type in FAMILIES and TritonLayers.fits(
            config, drafter.layers, drafter.rotary_emb, weight.dtype, weight.device
        )

    def write_context(
        self,
        features: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        kv: PagedKVCache,
    ) -> None:
        """See DraftForward."""
        if not self._context.run(features, positions, slots, kv):
            positions, slots = to_device([positions, slots], features.device)
            self._layers.write_context(features, positions, slots, kv)

    def hidden(self, tokens: torch.Tensor, plan: AttentionPlan, kv: PagedKVCache) -> torch.Tensor:
        """See DraftForward."""
        every_row = torch.arange(len(tokens))
        out = self._padded.run(tokens, plan, every_row, kv)
        if out is None:
            tokens, every_row = plan.move(tokens, every_row)
            out = self._run(tokens, plan, every_row, kv)
        return out[0]

    def warm_up(self, kv: PagedKVCache, window: int | None, candidates: int) -> None:
        """See DraftForward."""
        super().warm_up(kv, window, candidates)
        features = self._drafter.norm.weight.new_zeros(1, self._drafter.config.hidden_size)
        self._context.warm_up(features, kv)
        self._padded.warm_up(kv, KERNELS.rows[-1], window=window)

    def _run(
        self,
        tokens: torch.Tensor,  # [T]
        plan: AttentionPlan | RowPlan,
        _: torch.Tensor,  # every row
        kv: PagedKVCache,
    ) -> tuple[torch.Tensor, None]:
        from dspark.kernels.triton.rows import add_rms_norm

        x, delta, _taps = self._layers.run(self._drafter.embed(tokens), plan, kv)
        return add_rms_norm(x, delta, self._drafter.norm.weight, self._eps), None


def _draft_head(drafter: DSparkDrafter) -> DraftHead:
    """The heads' weights as the Triton kernels take them."""
    from dspark.kernels.triton.draft_head import DraftHead

    head, confidence = drafter.markov_head, drafter.confidence_head
    made = DraftHead(drafter.draft_token_ids.contiguous())
    if confidence is not None:
        weight = confidence.proj.weight[0].contiguous()
        made = replace(made, confidence=weight, confidence_bias=confidence.proj.bias)
    if isinstance(head, MarkovHead):
        w1, w2 = head.markov_w1.weight, head.markov_w2.weight
        made = replace(made, w1=w1.contiguous(), w2=w2.contiguous())
        if type(head) is not MarkovHead:  # torch makes the codes of the other kinds
            made = replace(made, step=head.step, first_state=head.first_state)
    return made


class FusedDraftForward:
    """The C++ operators, in bf16 on the CPU."""

    def __init__(self, drafter: DSparkDrafter) -> None:
        config = drafter.layers[0].self_attn.config
        self._embedding = drafter.embed_weight
        self._norm = drafter.norm.weight
        self._layers = FusedLayers(config, drafter.layers, drafter.rotary_emb)
        self._context = [_ContextProjection(layer.self_attn) for layer in drafter.layers]
        self._head = PackedLinear.of(drafter.head_weight.to(self._norm.dtype), torch.float32)
        assert drafter.confidence_head is not None
        assert isinstance(drafter.markov_head, MarkovHead)
        confidence = drafter.confidence_head.proj
        self._block_head = operators.BlockHead(
            w1=drafter.markov_head.markov_w1.weight.contiguous(),
            w2=operators.pack_linear(drafter.markov_head.markov_w2.weight),
            confidence=confidence.weight[0].contiguous(),
            confidence_bias=float(confidence.bias),
            vocabulary=drafter.draft_token_ids,
        )

    @staticmethod
    def fits(drafter: DSparkDrafter) -> bool:
        """Whether the operators compute what this drafter's modules do."""
        config, weight = drafter.config, drafter.norm.weight
        return (
            can_pack(weight.dtype, weight.device)
            and config.markov_head_type == "vanilla"
            and config.markov_rank > 0
            and config.markov_rank % operators.LANES == 0
            and config.enable_confidence_head
            and config.confidence_head_with_markov
            and drafter.softcap is None
            and FusedLayers.fits(
                drafter.layers[0].self_attn.config,
                drafter.layers,
                drafter.rotary_emb,
                weight.dtype,
                weight.device,
            )
        )

    def write_context(
        self,
        features: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        kv: PagedKVCache,
    ) -> None:
        """See DraftForward."""
        shape = self._layers.shape
        cos, sin = self._layers.rotary(positions)
        for index, context in enumerate(self._context):
            rows = operators.linear(features, context.weight, context.bias, context.outputs)
            operators.rotate_write(
                rows,
                cos,
                sin,
                context.norms,
                shape.eps,
                *kv.pages(index, shape.kv_heads, shape.width),
                slots,
                heads=0,
                width=shape.width,
            )

    def hidden(self, tokens: torch.Tensor, plan: AttentionPlan, kv: PagedKVCache) -> torch.Tensor:
        """See DraftForward."""
        x = F.embedding(tokens, self._embedding)
        delta = torch.empty_like(x)
        cos, sin = self._layers.rotary(plan.positions)
        self._layers.run(0, len(self._layers), x, delta, cos, sin, plan, kv, fresh=True)
        return operators.add_rms_norm(x, delta, self._norm, self._layers.shape.eps)

    def draw(
        self, hidden: torch.Tensor, anchors: torch.Tensor, rules: DrawRules, candidates: int
    ) -> DrawnBlocks:
        """See DraftForward."""
        return operators.draw_blocks(
            self._head(hidden), hidden, anchors, self._block_head, rules, candidates
        )

    def warm_up(self, kv: PagedKVCache, window: int | None, candidates: int) -> None:
        """See DraftForward."""


class _ContextProjection:
    """[K; V] of one layer as one product."""

    def __init__(self, attention: Any) -> None:
        parts = (attention.k_proj, attention.v_proj)
        weight = torch.cat([part.weight for part in parts])
        biases = [part.bias for part in parts if part.bias is not None]
        self.outputs = len(weight)
        self.weight = operators.pack_linear(weight)
        self.bias = operators.pack_bias(torch.cat(biases)) if biases else None
        norm = getattr(getattr(attention, "k_norm", None), "weight", None)
        self.norms = None if norm is None else (norm, norm)
