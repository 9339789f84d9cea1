"""Tokenizers made here, without a network: byte-level BPE and a SentencePiece-like one."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<|im_start|>", "<|im_end|>"
_CORPUS = [
    "The quick brown fox jumps over the lazy dog, and then it stops. STOP here, user!",
    "héllo wörld, naïve café — 你好 世界 🎉🎉 and some more English text about numbers 1 2 3",
    "system user assistant hello answer the question one two three four five six seven",
] * 3
_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('a system turn must come first') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def byte_level() -> Any:
    """Like SmolLM2's: every text can be spelled, a character may take several tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        show_progress=False,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(_CORPUS, trainer)
    made.add_tokens([AddedToken("<tool>", normalized=False), AddedToken(" ←é", normalized=False)])
    return _fast(made, chat_template=_TEMPLATE)


def with_developer() -> Any:
    """Like `byte_level`, with a template that knows the role `developer`."""
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.chat_template = "{# system, developer, user, assistant #}" + _TEMPLATE
    return tokenizer


@cache
def sentencepiece_like() -> Any:
    """Like Llama 2's: spaces are ▁, and what has no token is spelled in byte tokens."""
    pieces = [BOS, EOS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyz.,!'你"))
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "▁"), ("l", "l"), ("▁", "a")]
    vocab = {piece: i for i, piece in enumerate([*pieces, *letters, *map("".join, merges)])}
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(Regex(" "), "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens([BOS, EOS, "<unk>"])
    return _fast(made)


def without_template() -> Any:
    """A base model's tokenizer."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level().backend_tokenizer, bos_token=BOS, eos_token=EOS
    )
    assert tokenizer.chat_template is None
    return tokenizer


def _fast(tokenizer: Tokenizer, **more: Any) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        **more,
    )
