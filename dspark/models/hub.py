"""Drafters by Hugging Face id: `owner/name`, or `owner/name@revision`.

Only what a drafter is made of is fetched: configuration, safetensors and, of a causal LM, the
tokenizer that tells its vocabulary. The hub's own
settings hold: HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT, HF_TOKEN. What is in its cache already is not
fetched again.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from dspark.errors import DownloadError

_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]  # no code, no pickles
_IN_FOLDERS = ["*/*"]


def fetch_drafter(name: str) -> Path:
    """The folder that holds it; DownloadError if `name` is no id, or is not to be had."""
    repository, at, revision = name.partition("@")
    if repository.count("/") != 1 or bool(at) != bool(revision):
        raise DownloadError(f"{name!r} is not of the form owner/name or owner/name@revision")
    try:
        folder = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=_WANTED,
            ignore_patterns=_IN_FOLDERS,
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise DownloadError(" ".join(str(error).split())) from error
    return Path(folder)
