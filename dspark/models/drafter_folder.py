"""Which drafter the settings name. Loads neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path

from dspark.config import ModelConfig
from dspark.errors import ConfigError, DownloadError
from dspark.models.builtin import resolve_target, shipped_drafter
from dspark.models.hub import fetch_drafter

NO_DRAFTER = "none"  # decode plainly
PROMPT_LOOKUP = "prompt-lookup"  # draft from requests' own text alone


def drafter_folder(model: ModelConfig) -> Path | None:
    """The drafter that the settings name or imply, fetched if it is a Hugging Face id.

    ConfigError if a named one is to be had in neither way.
    """
    if model.drafter in (NO_DRAFTER, PROMPT_LOOKUP):
        return None
    if not model.drafter:
        return shipped_drafter(model.target)
    folder = Path(resolve_target(model.drafter))
    if folder.is_dir():
        return folder
    try:
        return fetch_drafter(model.drafter)
    except DownloadError as error:
        raise ConfigError(
            f"the drafter {model.drafter!r} is no folder here, nor could it be fetched as a "
            f"Hugging Face id: {error}. Name a folder that holds config.json and "
            f"model.safetensors, an id, {PROMPT_LOOKUP!r} to draft from requests' own text, or "
            f"{NO_DRAFTER!r} to decode plainly"
        ) from error
