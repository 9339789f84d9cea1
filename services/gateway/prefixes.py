"""The beginnings of a prompt, as hashes that the scheduler compares."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from dspark.pb import scheduler_pb2 as pb

_FIRST_TOKENS = 16  # then twice as many, and so on
_MOST = 12  # the longest has 32,768 tokens


def prefixes_of(model: str, token_ids: Sequence[int]) -> list[pb.Prefix]:
    """The first 16, 32, 64, … tokens, as far as there is one more: the last is always computed."""
    prefixes: list[pb.Prefix] = []
    digest, start, end = blake2b(model.encode()).digest(), 0, _FIRST_TOKENS
    while end < len(token_ids) and len(prefixes) < _MOST:
        digest = blake2b(digest + array("q", token_ids[start:end]).tobytes()).digest()
        prefixes.append(pb.Prefix(tokens=end, hash=int.from_bytes(digest[:8], "little")))
        start, end = end, 2 * end
    return prefixes
