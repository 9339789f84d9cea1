"""A causal LM as a drafter: which folders hold one, and whether it speaks the target's language.

Tokens are compared by id, so the two must have one vocabulary: the same tokens by the same ids, and
as many rows of logits.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig

from dspark.errors import CheckpointError, ConfigError
from dspark.models.checkpoint import CONFIG_FILE
from dspark.models.tokenizer import load_tokenizer

_DSPARK_FIELDS = frozenset({"target_layer_ids", "mask_token_id", "markov_rank"})


def is_causal_lm(folder: Path) -> bool:
    """Whether a folder's configuration is that of a language model, and not of a DSpark drafter."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        names = [str(name) for name in config.get("architectures") or ()]
        drafter = bool(_DSPARK_FIELDS & config.keys())
    except (OSError, ValueError, AttributeError, TypeError):
        return False  # whoever reads it as a drafter's says what is wrong with it
    return not drafter and any(name.endswith("ForCausalLM") for name in names)


def check_vocabulary(folder: Path, target: str, vocab_size: int) -> None:
    """CheckpointError, naming what differs, unless drafter and target have one vocabulary.

    `target`: its name; `vocab_size`: rows of its logits.
    """
    try:
        own_size: int = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
        own = load_tokenizer(str(folder)).get_vocab()
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"cannot tell the vocabulary of drafter {folder}: {error}") from error
    if own_size != vocab_size:
        raise CheckpointError(
            f"drafter {folder} has vocab_size {own_size}, target {target!r} has {vocab_size}: "
            "choose a drafter of the target's own family"
        )
    theirs = load_tokenizer(target).get_vocab()
    different = sorted(
        token for token in own.keys() | theirs.keys() if own.get(token) != theirs.get(token)
    )
    if different:
        token = different[0]
        raise CheckpointError(
            f"the tokenizers of drafter {folder} and target {target!r} differ in {len(different)} "
            f"tokens: {token!r} has id {own.get(token)} in the drafter's and {theirs.get(token)} "
            "in the target's; choose a drafter of the target's own family"
        )
