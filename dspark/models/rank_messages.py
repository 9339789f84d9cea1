"""What the process of rank 0 tells the other ranks of a target: frames of integers on a socket.

A frame is its length, the lengths of its arrays, and the arrays: nothing in it is code.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dspark.errors import ProtocolError
from dspark.kernels.attention_plan import AttentionPlan

Integers = npt.NDArray[np.int64] | npt.NDArray[np.int32]

_LENGTH = struct.Struct("<q")
_MOST_BYTES = 1 << 30
_STEP, _WHOLE = 0, 1
_NO_WINDOW = -1


@dataclass(frozen=True, slots=True)
class StepMessage:
    """A step over a cache that all ranks have under one number, each with its own heads."""

    cache: int
    num_pages: int  # of the cache
    dropped: list[int]  # caches that nobody uses any more
    token_ids: torch.Tensor  # [T] int64
    attention: AttentionPlan
    logit_rows: torch.Tensor  # [N] int64

    def to_bytes(self) -> bytes:
        """As a frame's content."""
        plan = self.attention
        window = _NO_WINDOW if plan.window is None else plan.window
        return _pack(
            [
                np.array([_STEP, self.cache, self.num_pages, window], dtype=np.int64),
                np.array(self.dropped, dtype=np.int64),
                *(t.numpy() for t in (self.token_ids, plan.positions, plan.reach, plan.slots)),
                np.array(plan.row_counts, dtype=np.int64),
                np.array(plan.kv_lens, dtype=np.int64),
                self.logit_rows.numpy(),
                plan.tables.numpy(),
            ]
        )


@dataclass(frozen=True, slots=True)
class WholeMessage:
    """Texts to run from their first token on, as TargetModel.forward_whole takes them."""

    texts: list[torch.Tensor]  # S × [L_s] int64
    logit_rows: torch.Tensor  # [N] int64

    def to_bytes(self) -> bytes:
        """As a frame's content."""
        kind = np.array([_WHOLE], dtype=np.int64)
        return _pack([kind, self.logit_rows.numpy(), *(text.numpy() for text in self.texts)])


def read_message(content: bytes, device: torch.device) -> StepMessage | WholeMessage:
    """The message of a frame; ProtocolError if it is none."""
    try:
        raw = _unpack(content)
        head, *arrays = (np.frombuffer(part, dtype=np.int64) for part in raw[:-1])
        if head[0] == _WHOLE:
            texts = [*arrays[1:], np.frombuffer(raw[-1], dtype=np.int64)]
            return WholeMessage([torch.tensor(text) for text in texts], torch.tensor(arrays[0]))
        _, cache, num_pages, window = head.tolist()
        dropped, token_ids, positions, reach, slots, row_counts, kv_lens, logit_rows = arrays
        tables = np.frombuffer(raw[-1], dtype=np.int32).reshape(len(row_counts), -1)
        row_starts = np.concatenate([[0], np.cumsum(row_counts)])
    except (IndexError, ValueError, struct.error) as error:
        raise ProtocolError(f"rank 0 sent a frame that is no step: {error}") from error
    plan = AttentionPlan(
        positions=torch.tensor(positions),
        reach=torch.tensor(reach),
        slots=torch.tensor(slots),
        row_counts=row_counts.tolist(),
        row_starts=torch.from_numpy(row_starts),
        kv_lens=kv_lens.tolist(),
        tables=torch.tensor(tables),
        device=device,
        window=None if window == _NO_WINDOW else window,
    )
    return StepMessage(
        cache=cache,
        num_pages=num_pages,
        dropped=dropped.tolist(),
        token_ids=torch.tensor(token_ids),
        attention=plan,
        logit_rows=torch.tensor(logit_rows),
    )


def send(to: socket.socket, content: bytes) -> None:
    """Send a frame; OSError if nobody takes it in the socket's time."""
    to.sendall(_LENGTH.pack(len(content)) + content)


def receive(source: socket.socket) -> bytes:
    """The next frame's content; EOFError at the end, ProtocolError if it is too long."""
    (length,) = _LENGTH.unpack(_exactly(source, _LENGTH.size))
    if not 0 <= length <= _MOST_BYTES:
        raise ProtocolError(f"a frame of {length} bytes was announced; {_MOST_BYTES} are the most")
    return _exactly(source, length)


def _exactly(source: socket.socket, count: int) -> bytes:
    content = bytearray(count)
    view, filled = memoryview(content), 0
    while filled < count:
        got = source.recv_into(view[filled:])
        if got == 0:
            raise EOFError
        filled += got
    return bytes(content)


def _pack(arrays: Sequence[Integers]) -> bytes:
    lengths = np.array([len(arrays), *(array.nbytes for array in arrays)], dtype=np.int64)
    return b"".join([lengths.tobytes(), *(array.tobytes() for array in arrays)])


def _unpack(content: bytes) -> list[bytes]:
    (count,) = _LENGTH.unpack_from(content)
    if not 0 < count <= len(content) // _LENGTH.size - 1:
        raise ValueError(f"it has {count} arrays")
    lengths = np.frombuffer(content, dtype=np.int64, count=count, offset=_LENGTH.size)
    ends = (1 + count) * _LENGTH.size + np.cumsum(lengths)
    if (lengths < 0).any() or ends[-1] != len(content):
        raise ValueError("its arrays have not the lengths that it says")
    return [content[end - n : end] for end, n in zip(ends, lengths, strict=True)]
