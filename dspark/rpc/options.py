"""Limits and keep-alive of every gRPC server and channel, in one place."""

from __future__ import annotations

# The largest message is a batch of draft work: bounded rows a request, bounded requests a step.
MAX_MESSAGE_BYTES = 32 * 1024 * 1024
# What the outside world may send: a prompt, no more.
MAX_PUBLIC_MESSAGE_BYTES = 4 * 1024 * 1024

_KEEPALIVE_MS = 10_000
_KEEPALIVE_TIMEOUT_MS = 5_000
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
    # gRPC measures the bandwidth with pings too. While one of these is unanswered it sends none to
    # keep alive, and would wait a minute for it: for that long, streams of a hung peer stood still.
    ("grpc.http2.ping_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
]


def server_options(max_message_bytes: int = MAX_MESSAGE_BYTES) -> list[tuple[str, int]]:
    """For grpc.aio.server."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        *_KEEPALIVE,
        # clients ping as often as we do; without this the server would hang up on them
        ("grpc.http2.min_recv_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
        ("grpc.so_reuseport", 0),  # a second process on the same port is a mistake, not a sibling
    ]


def channel_options() -> list[tuple[str, int]]:
    """For every channel, to a service or to a gateway."""
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        *_KEEPALIVE,
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
    ]
