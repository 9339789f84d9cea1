"""Counter-based random numbers: every draw is a pure function of its key.

A draw is named by (seed, stream, counters…). Nothing is stored, so a draft service can compute the
same noise as the verifier for just the tokens that it looks at, on any device, and a request can
move to another process without carrying generator state.

The generator is SplitMix64 (Steele, Lea, Flood 2014): the n-th output of the stream that starts at
`key` is mix(key + n·golden). The key itself hashes seed, stream and counters by the same mixer.

Losslessness in `rejection` mode needs the draft, accept and recover draws to be independent, hence
disjoint streams; `coupled` mode needs draft and target to share one, hence a fourth that the other
three never touch (design §2).
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import torch

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


class Stream(IntEnum):
    """The disjoint random streams of one request."""

    DRAFT = 1  # which token the drafter proposes
    ACCEPT = 2  # whether a proposed token is accepted
    RECOVER = 3  # the token after the last accepted one
    COUPLED = 4  # noise shared by drafter and target


def draw_key(seed: int, stream: Stream, *counters: int) -> int:
    """The 64-bit name of a draw."""
    key = _mix_int(seed & _WORD)
    for counter in (int(stream), *counters):
        key = _named_within(key, counter)
    return key


def draw_keys(seed: int, stream: Stream, *counters: int, last: Iterable[int]) -> list[int]:
    """The names of draws whose last counters alone differ: what they share is hashed once."""
    shared = draw_key(seed, stream, *counters)
    return [_named_within(shared, counter) for counter in last]


def key_tensor(keys: list[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Keys as int64 [N], the form that the functions below take."""
    return torch.tensor([_signed(key) for key in keys], dtype=torch.int64, device=device)


def uniform(keys: torch.Tensor) -> torch.Tensor:  # [N] int64 -> [N] float64 in (0, 1)
    """One uniform a key."""
    return _to_unit(_mix(keys))


def gumbel(
    keys: torch.Tensor,  # [N] int64
    token_ids: torch.Tensor,  # [V] or [N, V] int64
) -> torch.Tensor:  # [N, V] float64
    """Standard Gumbel noise for each (key, token): the same wherever it is computed."""
    if token_ids.dim() == 1:
        token_ids = token_ids[None]
    words = _mix(keys[:, None] + (token_ids + 1) * _signed(_GOLDEN))
    return -torch.log(-torch.log(_to_unit(words)))


def _to_unit(words: torch.Tensor) -> torch.Tensor:
    # Centred in their cell, so that neither 0 nor 1 can occur. 52 random bits, not 53: the half
    # must not be rounded away.
    return (_shift_right(words, 12).double() + 0.5) * 2.0**-52


def _mix(words: torch.Tensor) -> torch.Tensor:
    words = (words ^ _shift_right(words, 30)) * _signed(_MIX1)
    words = (words ^ _shift_right(words, 27)) * _signed(_MIX2)
    return words ^ _shift_right(words, 31)


def _shift_right(words: torch.Tensor, bits: int) -> torch.Tensor:
    # int64 shifts keep the sign: mask it away, since torch has no full set of uint64 operators
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _named_within(key: int, counter: int) -> int:
    return _mix_int((key + _GOLDEN) ^ _mix_int(counter & _WORD))


def _mix_int(word: int) -> int:
    word &= _WORD
    word = ((word ^ (word >> 30)) * _MIX1) & _WORD
    word = ((word ^ (word >> 27)) * _MIX2) & _WORD
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
