"""The process of one rank of a target, above 0 (dspark.models.ranks starts it).

It loads its part, says so, and runs what rank 0 tells it until rank 0's end of the socket closes.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import sys
import threading
from typing import Any


def main() -> None:
    """Arguments: the socket's number, and a RankTask as JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is rank 0's to answer, by draining
    with socket.socket(fileno=int(sys.argv[1])) as link:
        # Before what takes long. A sum that waits for a rank that died would not be interrupted.
        threading.Thread(target=_end_with, args=(link.fileno(),), daemon=True).start()
        _serve(link, json.loads(sys.argv[2]))


def _end_with(fileno: int) -> None:
    """End this process when the other end of its socket closes."""
    poller = select.poll()
    poller.register(fileno, 0)  # that it hung up is always told
    poller.poll()
    os._exit(0)


def _serve(link: socket.socket, settings: dict[str, Any]) -> None:
    import torch

    from dspark.models.kv_cache import PagedKVCache
    from dspark.models.rank_messages import WholeMessage, read_message, receive, send
    from dspark.models.ranks import RankTask, join
    from dspark.models.sharding import load_part
    from dspark.models.target import TargetBatch, TargetModel

    task = RankTask(**settings)
    logging.basicConfig(level=task.log_level, format=f"rank {task.rank}: %(levelname)s %(message)s")
    torch.set_num_threads(task.threads)
    device = torch.device(task.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype: torch.dtype = getattr(torch, task.dtype)
    try:
        model = load_part(task.path, task.rank, task.size, dtype=dtype).to(device)
    except Exception as error:
        send(link, (str(error) or repr(error)).encode())
        raise
    send(link, b"")
    target = TargetModel(model, shard=join(task.store, task.rank, task.size, device))
    caches: dict[int, PagedKVCache] = {}
    while True:
        message = read_message(receive(link), device)
        if isinstance(message, WholeMessage):
            target.forward_whole(message.texts, message.logit_rows)
            continue
        for number in message.dropped:
            caches.pop(number, None)
        if message.cache not in caches:
            caches[message.cache] = PagedKVCache(message.num_pages, device)
        batch = TargetBatch(message.token_ids, message.attention, message.logit_rows)
        target.forward(batch, caches[message.cache])


if __name__ == "__main__":
    main()
