"""Putting engines together from settings: used by the in-process LLM and by the services alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dspark.config import DraftConfig, EngineConfig, ModelConfig
from dspark.engine.autoregressive import AutoregressiveBlocks
from dspark.engine.draft_link import DraftLink
from dspark.engine.drafting import DraftEngine, Drafter
from dspark.engine.dspark_blocks import DSparkBlocks
from dspark.engine.lookup import BLOCK_SIZE as LOOKUP_BLOCK_SIZE
from dspark.engine.lookup import PromptLookup
from dspark.engine.profiling import Grid
from dspark.engine.step_times import StepTimeFiles, StepTimeStore, step_times
from dspark.engine.verifier import VerifierEngine
from dspark.errors import ConfigError
from dspark.kernels.attention_plan import pages_for
from dspark.models.builtin import resolve_target
from dspark.models.causal_drafter import check_vocabulary, is_causal_lm
from dspark.models.checkpoint import fingerprint, load_drafter, read_calibration, read_config
from dspark.models.drafter import DrafterConfig, FeatureProjection
from dspark.models.drafter_folder import NO_DRAFTER, PROMPT_LOOKUP, drafter_folder
from dspark.models.packed_linear import can_pack, pack_linears
from dspark.models.target import TargetModel
from dspark.models.target_ends import StoredEnds, TargetEnds
from dspark.scheduling.calibration import CalibrationInUse, CalibrationTable


@dataclass(frozen=True, slots=True)
class LoadedTarget:
    """A target, and the verifier's part of its drafter where there is one."""

    target: TargetModel
    projection: FeatureProjection | None  # None: the drafter reads token ids, or there is none
    drafter_fingerprint: str  # empty without a drafter
    block_size: int  # 0 without a drafter
    context_window: int  # 0: all
    calibration: CalibrationTable | None  # the drafter's, where it has one
    eos_token_ids: tuple[int, ...]
    drafter: str  # as the settings name it

    @property
    def has_drafter(self) -> bool:
        """Whether there is a drafter, here or elsewhere."""
        return bool(self.drafter_fingerprint)


def load_target(model: ModelConfig) -> LoadedTarget:
    """Load the target with taps for its drafter."""
    _use_threads(model)
    folder = drafter_folder(model)
    dtype: torch.dtype = getattr(torch, model.dtype)
    reads_tokens = folder is not None and is_causal_lm(folder)
    config = None if folder is None or reads_tokens else read_config(folder)
    target = TargetModel.load(
        resolve_target(model.target),
        dtype=dtype,
        device=model.device,
        tap_layer_ids=() if config is None else config.target_layer_ids,
        batch_invariant=model.batch_invariant,
        tensor_parallel=model.tensor_parallel,
    )
    projection = None
    if folder is not None and reads_tokens:
        check_vocabulary(folder, model.target, target.vocab_size)
    elif folder is not None:
        projection = load_drafter(folder, target).feature_projection
        projection.to(device=model.device, dtype=dtype).requires_grad_(False)
        if can_pack(dtype, model.device):
            pack_linears(projection)
    block_size = _block_size(config, reads_tokens)
    return LoadedTarget(
        target=target,
        projection=projection,
        drafter_fingerprint="" if folder is None else fingerprint(folder),
        block_size=block_size,
        context_window=0 if config is None else config.context_window,
        calibration=None if folder is None else read_calibration(folder, block_size),
        eos_token_ids=eos_token_ids(target),
        drafter=model.drafter,
    )


def _use_threads(model: ModelConfig) -> None:
    if model.threads:
        torch.set_num_threads(max(1, model.threads // model.tensor_parallel))
    elif model.device != "cpu":
        # The host only prepares steps: helpers would do little and, between steps, wait in a loop.
        torch.set_num_threads(1)


def _block_size(config: DrafterConfig | None, reads_tokens: bool) -> int:
    if config is not None:
        return config.block_size
    return AutoregressiveBlocks.block_size if reads_tokens else 0


def load_draft_engine(
    model: ModelConfig, draft: DraftConfig, target: TargetEnds | None = None
) -> DraftEngine:
    """Load a drafter; ConfigError without one.

    Shares the ends of a `target` that is there; otherwise they are read from its files.
    """
    _use_threads(model)
    folder = drafter_folder(model)
    if folder is None:
        raise ConfigError(
            f"no drafter is known for {model.target!r}: train one with `dspark train`, or choose a "
            "small causal LM of the same vocabulary, and name its folder as the drafter"
        )
    dtype: torch.dtype = getattr(torch, model.dtype)
    if target is None:
        target = StoredEnds(resolve_target(model.target), dtype=dtype, device=model.device)
    drafter: Drafter
    if is_causal_lm(folder):
        check_vocabulary(folder, model.target, target.vocab_size)
        drafter = AutoregressiveBlocks(TargetModel.load(folder, dtype=dtype, device=model.device))
    else:
        drafter = DSparkBlocks(load_drafter(folder, target).for_inference(dtype, model.device))
    engine = DraftEngine(drafter, pages_for(draft.cache_tokens) + 1)
    engine.warm_up()
    return engine


def make_verifier(
    loaded: LoadedTarget,
    engine: EngineConfig,
    link: DraftLink | None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    shared: StepTimeStore | None = None,
) -> VerifierEngine:
    """A verifier with a step-time table, if its policy needs one.

    The table is kept in the user's cache folder, and in `shared` for other machines like this one.
    ConfigError if the settings contradict each other.
    """
    link = link if loaded.has_drafter else None
    if loaded.drafter == PROMPT_LOOKUP and not engine.prompt_lookup:
        raise ConfigError(
            f"the drafter is {PROMPT_LOOKUP!r} and prompt_lookup is false: switch it on, or name "
            f"{NO_DRAFTER!r} as the drafter"
        )
    looks_up = engine.prompt_lookup and loaded.drafter != NO_DRAFTER
    verifier = VerifierEngine(
        loaded.target,
        engine,
        projection=None if link is None else loaded.projection,
        link=link,
        lookup=PromptLookup() if looks_up else None,
        block_size=loaded.block_size or LOOKUP_BLOCK_SIZE,
        context_window=loaded.context_window,
        calibration=CalibrationInUse(
            loaded.block_size, loaded.drafter_fingerprint, loaded.calibration
        ),
        eos_token_ids=loaded.eos_token_ids,
    )
    verifier.warm_up()
    if verifier.drafts and engine.policy == "adaptive":
        grid = Grid.of(
            loaded.target,
            block_size=verifier.block_size,
            max_requests=engine.max_requests,
            cache_tokens=engine.cache_tokens,
        )
        stores = [StepTimeFiles(), *([] if shared is None else [shared])]
        verifier.table = step_times(loaded.target, verifier.kv, grid, stores, on_progress)
    return verifier


def eos_token_ids(target: TargetModel) -> tuple[int, ...]:
    """Tokens that end a generation, by the model's generation settings."""
    config = getattr(target.model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
