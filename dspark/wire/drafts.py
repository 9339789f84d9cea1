"""Between a verifier and its drafter: work, blocks, and what is to be sent again."""

from __future__ import annotations

import numpy as np
import torch

from dspark.config import MAX_BLOCK_SIZE
from dspark.errors import InvalidRequestError, ProtocolError
from dspark.pb import draft_pb2
from dspark.types import BlockProposal, DraftWork, Fence, FloatArray, IntArray, ResyncRequest
from dspark.wire.bounds import MAX_CANDIDATES, MAX_ID_CHARS, MAX_POSITION
from dspark.wire.requests import sampling_from_pb, sampling_to_pb

_LAW_TOLERANCE = 1e-3  # on the sum of a position's probabilities, float32 over many candidates


def work_to_pb(work: DraftWork) -> draft_pb2.DraftWork:
    """Work with its features as bfloat16 rows, or its token ids."""
    rows = work.features.to(device="cpu", dtype=torch.bfloat16).contiguous()
    return draft_pb2.DraftWork(
        fence=_fence_to_pb(work.fence),
        feature_start=work.feature_start,
        features=rows.view(torch.uint8).numpy().tobytes() if rows.numel() else b"",
        anchor_token_id=work.anchor_token_id,
        block_size=work.block_size,
        sampling=sampling_to_pb(work.sampling),
        token_ids=None if work.token_ids is None else work.token_ids.tolist(),
    )


def work_from_pb(message: draft_pb2.DraftWork, width: int, vocab_size: int) -> DraftWork:
    """Work as the draft service takes it; ProtocolError if it breaks the contract.

    `width`: of the features that the drafter reads; 0: it reads token ids.
    """
    fence = _fence_from_pb(message.fence)
    features, token_ids = _context_from_pb(message, width, vocab_size)
    if message.block_size > MAX_BLOCK_SIZE:
        raise ProtocolError(
            f"block_size must be at most {MAX_BLOCK_SIZE}; got {message.block_size}"
        )
    length = len(features if token_ids is None else token_ids)
    if message.feature_start + length > MAX_POSITION:
        raise ProtocolError(f"context reaches past position {MAX_POSITION}")
    if message.anchor_token_id >= vocab_size:
        raise ProtocolError(
            f"anchor_token_id must lie below {vocab_size}; got {message.anchor_token_id}"
        )
    try:
        sampling = sampling_from_pb(message.sampling)
    except InvalidRequestError as error:
        raise ProtocolError(f"sampling: {error}") from error
    return DraftWork(
        fence=fence,
        feature_start=message.feature_start,
        features=features,
        anchor_token_id=message.anchor_token_id,
        block_size=message.block_size,
        sampling=sampling,
        token_ids=token_ids,
    )


def _context_from_pb(
    message: draft_pb2.DraftWork, width: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:  # features [n, d], token ids [n]
    if not width:
        token_ids = torch.tensor(message.token_ids, dtype=torch.int64)
        if message.features or (len(token_ids) and int(token_ids.max()) >= vocab_size):
            raise ProtocolError(
                f"this drafter reads token ids below {vocab_size} and no features; got "
                f"{len(message.features)} bytes of features and {len(token_ids)} ids, the largest "
                f"{max(message.token_ids, default=0)}"
            )
        return torch.empty(0, 0), token_ids
    row_bytes = 2 * width
    if message.token_ids or len(message.features) % row_bytes:
        raise ProtocolError(
            f"features must be whole rows of {row_bytes} bytes, without token ids; got "
            f"{len(message.features)} bytes and {len(message.token_ids)} ids"
        )
    # bytearray: torch wants memory that it may write to
    raw = torch.frombuffer(bytearray(message.features), dtype=torch.bfloat16) \
        if message.features else torch.empty(0, dtype=torch.bfloat16)  # fmt: skip
    return raw.view(-1, width), None


def proposal_to_pb(proposal: BlockProposal) -> draft_pb2.BlockProposal:
    """A block as a message."""
    message = draft_pb2.BlockProposal(
        fence=_fence_to_pb(proposal.fence),
        token_ids=proposal.token_ids.tolist(),
        confidences=proposal.confidences.tolist(),
    )
    if proposal.candidate_ids is not None and proposal.candidate_probs is not None:
        message.candidates = proposal.candidate_ids.shape[1]
        message.candidate_ids = proposal.candidate_ids.astype("<u4").tobytes()
        message.candidate_probs = proposal.candidate_probs.astype("<f4").tobytes()
    return message


def proposal_from_pb(message: draft_pb2.BlockProposal, vocab_size: int) -> BlockProposal:
    """A block as the verifier takes it; ProtocolError if it breaks the contract."""
    size, k = len(message.token_ids), message.candidates
    if not 0 < size <= MAX_BLOCK_SIZE or len(message.confidences) != size:
        raise ProtocolError(
            f"a block needs 1 to {MAX_BLOCK_SIZE} tokens and a confidence for each; got {size} "
            f"tokens and {len(message.confidences)} confidences"
        )
    tokens = np.array(message.token_ids, dtype=np.int64)
    confidences = np.array(message.confidences, dtype=np.float32)
    if int(tokens.max()) >= vocab_size:
        raise ProtocolError(f"token_ids must lie below {vocab_size}; got {int(tokens.max())}")
    if not ((confidences >= 0) & (confidences <= 1)).all():
        raise ProtocolError(f"confidences must lie in 0..1; got {confidences.tolist()}")
    fence = _fence_from_pb(message.fence)
    if not k:
        return BlockProposal(fence, tokens, confidences)
    ids, probs = _law_from_pb(message, size, k, vocab_size)
    return BlockProposal(fence, tokens, confidences, ids, probs)


def _law_from_pb(
    message: draft_pb2.BlockProposal, size: int, k: int, vocab_size: int
) -> tuple[IntArray, FloatArray]:  # [γ, K]
    if k > MAX_CANDIDATES or {len(message.candidate_ids), len(message.candidate_probs)} != {
        4 * size * k
    }:
        raise ProtocolError(
            f"a law of {size} × {k} candidates needs {4 * size * k} bytes of ids and as many of "
            f"probabilities, and at most {MAX_CANDIDATES} candidates; got "
            f"{len(message.candidate_ids)} and {len(message.candidate_probs)} bytes"
        )
    ids = np.frombuffer(message.candidate_ids, dtype="<u4").reshape(size, k).astype(np.int64)
    probs = np.frombuffer(message.candidate_probs, dtype="<f4").reshape(size, k).astype(np.float32)
    if int(ids.max()) >= vocab_size:
        raise ProtocolError(f"candidate_ids must lie below {vocab_size}; got {int(ids.max())}")
    sums = probs.sum(axis=1)
    if (
        not (np.isfinite(probs).all() and (probs >= 0).all())
        or (np.abs(sums - 1.0) > _LAW_TOLERANCE).any()
    ):
        raise ProtocolError(f"candidate_probs must be laws; their sums are {sums.tolist()}")
    if any(len(np.unique(row)) != k for row in ids):
        raise ProtocolError("candidate_ids of one position must differ")
    return ids, probs


def resync_to_pb(resync: ResyncRequest) -> draft_pb2.ResyncRequest:
    """A resync request as a message."""
    return draft_pb2.ResyncRequest(
        session=resync.session, epoch=resync.epoch, have_len=resync.have_len
    )


def resync_from_pb(message: draft_pb2.ResyncRequest) -> ResyncRequest:
    """A resync request; what it names is looked up, so nothing needs checking."""
    return ResyncRequest(message.session, message.epoch, message.have_len)


def _fence_to_pb(fence: Fence) -> draft_pb2.Fence:
    return draft_pb2.Fence(
        session=fence.session,
        epoch=fence.epoch,
        round=fence.round,
        committed_len=fence.committed_len,
    )


def _fence_from_pb(message: draft_pb2.Fence) -> Fence:
    if not 0 < len(message.session) <= MAX_ID_CHARS:
        raise ProtocolError(
            f"session must have 1 to {MAX_ID_CHARS} characters; got {len(message.session)}"
        )
    if not 0 < message.committed_len <= MAX_POSITION:
        raise ProtocolError(
            f"committed_len must lie in 1..{MAX_POSITION}; got {message.committed_len}"
        )
    return Fence(message.session, message.epoch, message.round, message.committed_len)
