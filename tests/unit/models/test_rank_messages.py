"""What rank 0 says arrives as it was; anything else is refused."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark.errors import ProtocolError
from dspark.kernels.attention_plan import pages_for, plan_attention
from dspark.models.rank_messages import (
    StepMessage,
    WholeMessage,
    read_message,
    receive,
    send,
)

CPU = torch.device("cpu")
SPANS = st.lists(st.tuples(st.integers(0, 100), st.integers(1, 40)), min_size=1, max_size=6)


@given(SPANS, st.none() | st.integers(1, 64), st.lists(st.integers(0, 9)), st.booleans())
def test_a_step_arrives_as_it_was(
    spans: list[tuple[int, int]], window: int | None, dropped: list[int], block: bool
) -> None:
    pages = [np.arange(1, 1 + pages_for(a + n), dtype=np.int32) for a, n in spans]
    starts, counts = zip(*spans, strict=True)
    plan = plan_attention(pages, starts, counts, block=block, window=window)
    rows = sum(counts)
    message = StepMessage(3, 17, dropped, torch.arange(rows) * 7, plan, torch.arange(0, rows, 2))
    got = read_message(message.to_bytes(), CPU)
    assert isinstance(got, StepMessage)
    assert (got.cache, got.num_pages, got.dropped) == (3, 17, dropped)
    assert got.token_ids.equal(message.token_ids)
    assert got.logit_rows.equal(message.logit_rows)
    for name in ("positions", "reach", "slots", "row_starts", "tables"):
        mine, theirs = getattr(got.attention, name), getattr(plan, name)
        assert mine.dtype == theirs.dtype
        assert mine.equal(theirs)
    assert list(got.attention.row_counts) == list(counts)
    assert list(got.attention.kv_lens) == list(plan.kv_lens)
    assert got.attention.window == window


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5))
def test_texts_arrive_as_they_were(lengths: list[int]) -> None:
    texts = [torch.arange(length) for length in lengths]
    got = read_message(WholeMessage(texts, torch.tensor([1, 4])).to_bytes(), CPU)
    assert isinstance(got, WholeMessage)
    assert all(a.equal(b) for a, b in zip(got.texts, texts, strict=True))
    assert got.logit_rows.tolist() == [1, 4]


@given(st.binary(max_size=200))
def test_what_is_no_message_is_refused(content: bytes) -> None:
    with pytest.raises(ProtocolError, match="no step"):
        read_message(content, CPU)


def test_a_frame_is_whole_or_the_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, b"")
        send(ours, b"some")
        assert (receive(theirs), receive(theirs)) == (b"", b"some")
        ours.sendall((1 << 40).to_bytes(8, "little"))
        with pytest.raises(ProtocolError, match="1099511627776 bytes was announced"):
            receive(theirs)
        ours.sendall((9).to_bytes(8, "little") + b"cut")
        ours.close()
        with pytest.raises(EOFError):
            receive(theirs)
