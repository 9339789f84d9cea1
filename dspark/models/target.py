"""The target: any causal LM of transformers that calls the attention interface.

The model runs unmodified on flattened batches: one row of tokens from many sequences, with its own
position ids. Our function, registered as an attention implementation, writes the new keys and
values to pages and attends over each sequence's own. No mask function is registered with it, which
makes transformers skip building masks altogether.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from dspark.errors import CheckpointError, ConfigError, DSparkError
from dspark.kernels.attention_plan import (
    AttentionPlan,
    RowPlan,
    WholePlan,
    pages_for,
    plan_attention,
)
from dspark.kernels.dispatch import serves_with_triton
from dspark.kernels.reference.whole_attention import whole_attention
from dspark.kernels.transfer import to_device
from dspark.models.fused import FusedDecoder
from dspark.models.graphs import GATHERING, KERNELS, MODULES, PaddedSteps
from dspark.models.kv_cache import PagedKVCache
from dspark.models.packed_linear import PackedLinear, can_pack, pack_linears
from dspark.models.ranks import Ranks
from dspark.models.sharding import Shard, check_split, hook_sums, load_part
from dspark.models.triton_layers import TritonDecoder

ATTENTION_NAME = "dspark_paged"
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Their frequencies depend on the longest position in the *batch*: one request would change another.
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True, slots=True)
class TargetBatch:
    """One step's rows, flattened over sequences: T rows, N of them with logits.

    All is on the host, whatever the device: the target moves it, in one copy.
    """

    token_ids: torch.Tensor  # [T] int64
    attention: AttentionPlan
    logit_rows: torch.Tensor  # [N] int64, rising


@dataclass(frozen=True, slots=True)
class TargetOutput:
    """What the target says of a batch."""

    logits: torch.Tensor  # [N, V]
    taps: torch.Tensor | None  # [T, m·d] outputs of the tapped layers, side by side


class TargetModel:
    """A causal LM over pages, with taps on chosen layers."""

    def __init__(
        self,
        model: Any,
        tap_layer_ids: tuple[int, ...] = (),
        *,
        fused: bool = True,
        padded: bool | None = None,
        batch_invariant: bool = False,
        shard: Shard | None = None,
    ) -> None:
        """`padded`: whether steps are padded (models.graphs); None: on CUDA.

        `batch_invariant`: what a row says must not depend on the rows beside it, to the bit;
        ConfigError where that cannot be had. `shard`: which part of a target `model` is; those who
        have the others must do what is done here, in the same order.
        """
        config = model.config.get_text_config()
        _refuse_unsupported(config)
        self.model = model.eval().requires_grad_(False)
        self.config = config
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.batch_invariant = batch_invariant
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.num_layers: int = config.num_hidden_layers
        self.max_positions: int = config.max_position_embeddings
        # kept from before packing, which replaces the module
        self.embed_weight: torch.Tensor = model.get_input_embeddings().weight
        self.lm_head_weight: torch.Tensor = model.get_output_embeddings().weight
        self.final_norm_weight: torch.Tensor = _final_norm(model).weight
        self.tap_layer_ids = tap_layer_ids
        _check_taps(tap_layer_ids, config.num_hidden_layers)
        self._tapped: dict[int, torch.Tensor] = {}
        self._shard = shard
        self._ranks: Ranks | None = None  # those who have the other parts
        self._fused: FusedDecoder | TritonDecoder | None = None
        self._head: Callable[[torch.Tensor], torch.Tensor] | None = None  # of what these make
        self.padded: PaddedSteps | None = None
        # The C++ layers are one call, which has no place for a sum over ranks.
        if fused and shard is None and FusedDecoder.fits(model):
            self._fused = FusedDecoder(model)
            self._head = PackedLinear(model.get_output_embeddings(), torch.float32)
            model.get_decoder().layers = nn.ModuleList()  # never run again: half of the memory
            return
        _hook_taps(model, tap_layer_ids, self._tapped)
        register_attention()
        model.set_attn_implementation(ATTENTION_NAME)
        if can_pack(self.dtype, self.device):
            pack_linears(model)
        if shard is not None:
            hook_sums(model, shard)
        if fused and TritonDecoder.fits(model):
            self._fused = TritonDecoder(model, batch_invariant=batch_invariant, shard=shard)
            self._head = self._fused.head
        elif batch_invariant:
            raise ConfigError(
                f"batch_invariant: a {config.model_type} in {self.dtype} on {self.device.type} "
                "runs on kernels that sum a row by how many rows there are; it can be had for the "
                "families of Llama's shape, in bfloat16 on a CPU or with Triton on a GPU"
            )
        self._check_attention()
        on_cuda = self.device.type == "cuda"
        # Ranks would have to capture the same steps or none: a capture that one alone fails at
        # would have them add up rows of different steps.
        if shard is None and (on_cuda if padded is None else padded):
            padding = MODULES if self._on_triton() else GATHERING
            self.padded = PaddedSteps(
                self._run,
                self.device,
                capture=on_cuda,
                padding=padding if self._fused is None else KERNELS,
            )

    @property
    def fused(self) -> bool:
        """Whether the layers run on kernels of ours rather than as transformers' modules."""
        return self._fused is not None

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
        tap_layer_ids: tuple[int, ...] = (),
        batch_invariant: bool = False,
        tensor_parallel: int = 1,
    ) -> TargetModel:
        """Load a local folder or a hub id; CheckpointError if it cannot be used.

        `tensor_parallel`: how many processes have a part of it each; this one is the first of them
        (dspark.models.ranks). ConfigError if it cannot be split so.
        """
        try:
            config = AutoConfig.from_pretrained(path)
            _refuse_unsupported(config.get_text_config())
            if tensor_parallel > 1:
                check_split(config, tensor_parallel)
                return cls._load_split(path, tensor_parallel, dtype, device, tap_layer_ids)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot load the target {str(path)!r}: {error}") from error
        return cls(model.to(device), tap_layer_ids, batch_invariant=batch_invariant)

    @classmethod
    def _load_split(
        cls, path: str | Path, size: int, dtype: torch.dtype, device: str, taps: tuple[int, ...]
    ) -> TargetModel:
        ranks = Ranks(path, size, dtype=dtype, device=device)  # they load while we do
        try:
            model = load_part(path, 0, size, dtype=dtype).to(device)
            made = cls(model, taps, shard=ranks.join())
        except BaseException:
            ranks.close()
            raise
        made._ranks = ranks
        return made

    @property
    def tensor_parallel(self) -> int:
        """How many processes share a forward."""
        return 1 if self._shard is None else self._shard.size

    def on_lost(self, tell: Callable[[DSparkError], None]) -> None:
        """Call `tell`, from any thread, should a process be lost that has a part of the target."""
        if self._ranks is not None:
            self._ranks.on_lost(tell)

    def check(self) -> None:
        """UnavailableError if such a process is lost.

        On a GPU a forward returns before its sums are done, and those that wait for the lost are
        let go: what a step says counts if this passes once it has arrived on the host.
        """
        if self._ranks is not None:
            self._ranks.check()

    def close(self) -> None:
        """End the processes that have other parts of it, if any."""
        if self._ranks is not None:
            self._ranks.close()

    def _on_triton(self) -> bool:
        """Whether Triton's kernels are known to serve the attention of every layer."""
        heads: int = self.config.num_attention_heads
        kv_heads: int = getattr(self.config, "num_key_value_heads", None) or heads
        layers = self.model.get_decoder().layers
        widths = {
            getattr(getattr(layer, "self_attn", None), "head_dim", 0) for layer in layers
        }  # 0, which nothing serves, where a family has other names
        return all(
            serves_with_triton(self.dtype, self.device, width, heads, kv_heads) for width in widths
        )

    def _check_attention(self) -> None:
        """Run one token; CheckpointError unless every layer's attention reads our pages."""
        zero = torch.zeros(1, dtype=torch.int64)
        kv = PagedKVCache(2, self.device)
        page = np.ones(1, dtype=np.int32)
        self.forward(TargetBatch(zero, plan_attention([page], [0], [1], self.device), zero), kv)
        borrowing = getattr(self.config, "num_kv_shared_layers", None) or 0
        own = range(self.config.num_hidden_layers - borrowing)
        if not all(kv.holds(layer) for layer in own):
            raise _unsupported_attention(self.config.model_type)

    @torch.inference_mode()
    def forward(self, batch: TargetBatch, kv: PagedKVCache) -> TargetOutput:
        """Run the rows of one step, writing their keys and values to `kv`.

        UnavailableError, from then on, if a process is lost that has a part of the target.
        """
        together: AbstractContextManager[None] = nullcontext()
        if self._ranks is not None:
            together = self._ranks.step(batch.token_ids, batch.attention, batch.logit_rows, kv)
        with together:
            return self._forward(batch, kv)

    def _forward(self, batch: TargetBatch, kv: PagedKVCache) -> TargetOutput:
        out = None
        if self.padded is not None:
            out = self.padded.run(batch.token_ids, batch.attention, batch.logit_rows, kv)
        if out is None:
            token_ids, logit_rows = batch.attention.move(batch.token_ids, batch.logit_rows)
            out = self._run(token_ids, batch.attention, logit_rows, kv)
        said, taps = out
        return TargetOutput(said if self._head is None else self._head(said), taps)

    @torch.inference_mode()
    def forward_whole(
        self,
        texts: Sequence[torch.Tensor],  # S × [L_s] int64, on the host
        logit_rows: torch.Tensor,  # [N] int64 of the T = Σ L_s rows, rising, on the host
    ) -> TargetOutput:
        """Run sequences from their first token on, keeping nothing: rows are flattened, T in all.

        One call of attention serves them all where the modules run; the C++ operators take pages.
        """
        lengths = [len(text) for text in texts]
        if isinstance(self._fused, FusedDecoder):
            pages = [pages_for(length) for length in lengths]
            ends = np.cumsum(pages) + 1
            tables = [np.arange(e - n, e, dtype=np.int32) for n, e in zip(pages, ends, strict=True)]
            plan = plan_attention(tables, [0] * len(texts), lengths, self.device)
            kv = PagedKVCache(sum(pages) + 1, self.device)
            return self.forward(TargetBatch(torch.cat(list(texts)), plan, logit_rows), kv)
        with nullcontext() if self._ranks is None else self._ranks.whole(texts, logit_rows):
            return self._forward_whole(texts, logit_rows)

    def _forward_whole(
        self, texts: Sequence[torch.Tensor], logit_rows: torch.Tensor
    ) -> TargetOutput:
        lengths = [len(text) for text in texts]
        longest = max(lengths)
        padded = torch.zeros(len(texts), longest, dtype=torch.int64)
        real = torch.arange(longest) < torch.tensor(lengths)[:, None]
        padded[real] = torch.cat(list(texts))
        real_rows = real.flatten().nonzero()[:, 0]
        positions = torch.arange(longest).repeat(len(texts))
        moved = to_device(
            [padded.flatten(), positions, real_rows[logit_rows], real_rows], self.device
        )
        token_ids, positions, rows, kept = moved
        logits, taps = self._run_modules(token_ids, WholePlan(positions, len(texts)), rows, None)
        return TargetOutput(logits, None if taps is None else taps[kept])

    def _run(
        self,
        token_ids: torch.Tensor,  # [T]
        plan: AttentionPlan | RowPlan,
        logit_rows: torch.Tensor,  # [N]
        kv: PagedKVCache,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the head makes logits of [N, d], or logits [N, V] without one; taps [T, m·d]."""
        if self._fused is None:
            return self._run_modules(token_ids, plan, logit_rows, kv)
        if isinstance(self._fused, FusedDecoder):
            assert isinstance(plan, AttentionPlan)  # its steps are never padded
            return self._fused.forward(token_ids, plan, kv, logit_rows, self.tap_layer_ids)
        return self._fused.forward(token_ids, plan, kv, logit_rows, self.tap_layer_ids)

    def _run_modules(
        self,
        token_ids: torch.Tensor,  # [T]
        plan: AttentionPlan | RowPlan | WholePlan,
        logit_rows: torch.Tensor,  # [N]
        kv: PagedKVCache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [N, V] and taps [T, m·d]."""
        out = self.model(
            input_ids=token_ids[None],
            position_ids=plan.placed.positions[None],
            use_cache=False,
            logits_to_keep=logit_rows,
            dspark_plan=plan,
            dspark_kv=kv,
        )
        taps = None
        if self.tap_layer_ids:
            taps = torch.cat([self._tapped[i][0] for i in self.tap_layer_ids], dim=-1)
            self._tapped.clear()
        return out.logits[0], taps


def register_attention() -> None:
    """Make transformers know our attention; modules choose it by ATTENTION_NAME."""
    AttentionInterface.register(ATTENTION_NAME, _attend)


def _attend(
    module: nn.Module,
    query: torch.Tensor,  # [1, H, T, D], rotary embedding applied
    key: torch.Tensor,  # [1, G, T, D]
    value: torch.Tensor,  # [1, G, T, Dv]
    attention_mask: torch.Tensor | None,
    *,
    dspark_plan: AttentionPlan | RowPlan | WholePlan | None = None,
    dspark_kv: PagedKVCache | None = None,
    dspark_windows: Sequence[int | None] | None = None,  # by layer; None: the model's own
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    # A mask of the model's own making (Doge's) holds more than who sees whom, and pages drop it.
    if dspark_plan is None or attention_mask is not None:
        raise _unsupported_attention(type(module).__name__)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(dspark_plan, WholePlan):
        out = whole_attention(
            query[0], key[0], value[0], dspark_plan.sequences,
            scale=scale, window=sliding_window, softcap=softcap, sinks=s_aux,
        )  # fmt: skip
        return out[None], None
    assert dspark_kv is not None
    layer = _kv_layer(module)
    if layer == module.layer_idx:
        k, v = key[0].transpose(0, 1), value[0].transpose(0, 1)
        dspark_kv.write(layer, k, v, dspark_plan.placed.slots)
    out = dspark_kv.layer(layer).attend(
        query[0].transpose(0, 1),
        dspark_plan,
        scale=scale,
        window=sliding_window if dspark_windows is None else dspark_windows[layer],
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


def _kv_layer(module: Any) -> int:
    """The layer whose pages this one reads; Gemma's last layers borrow an earlier layer's."""
    own: int = module.layer_idx
    if not getattr(module, "is_kv_shared_layer", False):
        return own
    types = module.config.layer_types
    first_shared = module.config.num_hidden_layers - module.config.num_kv_shared_layers
    return max(i for i in range(first_shared) if types[i] == types[own])


def _hook_taps(model: Any, layer_ids: tuple[int, ...], into: dict[int, torch.Tensor]) -> None:
    for i in layer_ids:

        def keep(_module: nn.Module, _args: object, out: Any, i: int = i) -> None:
            into[i] = out[0] if isinstance(out, tuple) else out

        model.get_decoder().layers[i].register_forward_hook(keep)


def _check_taps(layer_ids: tuple[int, ...], layers: int) -> None:
    for i in layer_ids:
        if not 0 <= i < layers - 1:
            raise CheckpointError(
                f"cannot tap layer {i} of a target with {layers} layers: choose from 0 to "
                f"{layers - 2} (the last layer's output is what the LM head already reads)"
            )


def _final_norm(model: Any) -> Any:
    decoder = model.get_decoder()
    norm = getattr(decoder, "norm", None)
    if getattr(norm, "weight", None) is None or not hasattr(decoder, "layers"):
        raise CheckpointError(
            f"{model.config.model_type}: only decoders with `layers` and a weighted final `norm`, "
            "as in Llama's family, can be served"
        )
    return norm


def _unsupported_attention(what: str) -> CheckpointError:
    return CheckpointError(
        f"{what} does not go through transformers' attention interface in full, so its attention "
        "cannot run over pages; choose a target of another family"
    )


def _refuse_unsupported(config: Any) -> None:
    types = set(getattr(config, "layer_types", None) or ())
    if types - _LAYER_TYPES:
        raise CheckpointError(
            f"{config.model_type}: layers of type {sorted(types - _LAYER_TYPES)} keep a state that "
            "pages cannot hold; only full and sliding attention can be served"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for entry in nested:
        if entry.get("rope_type") in _BATCH_DEPENDENT_ROPE:
            raise CheckpointError(
                f"{config.model_type}: rope_type {entry['rope_type']!r} depends on the other "
                "requests of a batch, so output would not be the target's own; use a checkpoint "
                "with a static rope_type (default, linear, yarn, llama3)"
            )
