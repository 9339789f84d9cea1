"""Token ids to text, one token at a time, without ever taking a character back.

Concatenated, what a decoder returns equals the tokenizer's decode of all tokens but the special
ones. Two families need two ways:

- Byte-level BPE: a token is bytes, so an incremental UTF-8 decoder does it.
- Others (SentencePiece-like): the text of a token depends on its neighbours (a space stripped at
  the start, a run of byte tokens that is a character only as a whole), so a short window is decoded
  with and without the new tokens, once nothing after them can change it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from typing import Any, Protocol

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TokenDecoder(Protocol):
    """Turns the tokens of one generation into text."""

    def push(self, token_id: int) -> str:
        """Text that is certain now that this token is known; often its own, sometimes none."""

    def flush(self) -> str:
        """What was held back, now that nothing follows."""


def decoder_factory(tokenizer: Any) -> Callable[[], TokenDecoder]:
    """Makes decoders, one a generation, in the way that fits the tokenizer."""
    special = special_token_ids(tokenizer)
    if _is_byte_level(tokenizer):
        table = ByteTable(tokenizer, special)
        return lambda: ByteDecoder(table)
    return lambda: WindowDecoder(tokenizer, special)


def special_token_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that are control, not text."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


class ByteTable:
    """The bytes of each token of a byte-level vocabulary, looked up once."""

    def __init__(self, tokenizer: Any, special: frozenset[int]) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._byte_of = {char: byte for byte, char in byte_level_alphabet().items()}
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._look_up(token_id)
        return known

    def _look_up(self, token_id: int) -> bytes:
        # A model's embedding may have more rows than the tokenizer has tokens: those give no text.
        if token_id in self._special:
            return b""
        token: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        try:
            return bytes(self._byte_of[char] for char in token)
        except KeyError:  # an added token, spelled in plain text
            return token.encode()


class ByteDecoder:
    """For byte-level BPE; a character is returned with the token that completes it."""

    def __init__(self, table: ByteTable) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._table[token_id])

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """For every other tokenizer."""

    def __init__(self, tokenizer: Any, special: frozenset[int]) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._before: list[int] = []  # the tokens of the last text returned
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        token: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        if token_id in self._special or token is None:
            return ""
        self._held.append(token_id)
        # A run of byte tokens is decoded as a whole, and one bad byte spoils it all: wait for its
        # end. This also keeps the work linear when a run goes on and on.
        return "" if _BYTE_TOKEN.fullmatch(token) else self.flush()

    def flush(self) -> str:
        text = self._decode(self._before + self._held)[len(self._decode(self._before)) :]
        if text:  # tokens without text stay: what comes next may read differently after them
            self._before, self._held = self._held, []
        return text

    def _decode(self, token_ids: list[int]) -> str:
        # Cleaning up would change text that is out already (" ." to ".").
        text: str = self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        return text


def byte_level_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return False
    state = json.loads(decoder.__getstate__())
    parts = state["decoders"] if state["type"] == "Sequence" else [state]
    return all(part["type"] == "ByteLevel" for part in parts)
