"""The processes that run the other parts of a target, as the one of rank 0 has them.

Rank 0 is the process that there would be anyway: it alone samples, drafts and commits. Before each
forward it tells the others what to run, over a socket that each shares with it alone; then all run
their parts, and meet in two sums a layer. Each has the KV cache of its own heads.

The others end with rank 0, since its socket closes, however it ends. One that ends by itself is
seen at once, on a thread of its own; one that hangs is noticed when a sum takes longer than it may.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch

from dspark.errors import ConfigError, DSparkError, UnavailableError
from dspark.kernels.attention_plan import AttentionPlan
from dspark.models.kv_cache import PagedKVCache
from dspark.models.rank_messages import StepMessage, WholeMessage, receive, send
from dspark.models.sharding import Shard

log = logging.getLogger(__name__)

c10d: Any = torch.distributed  # its stubs lack the groups' options

TIMEOUT_S = 60.0  # that a rank may keep the others waiting within a step
_END_S = 5.0  # that one has to end before it is killed
_SEEN_S = 2.0  # in which one that has died is known to have


@dataclass(frozen=True, slots=True)
class RankTask:
    """What a rank is started with."""

    path: str  # of the target
    rank: int
    size: int
    dtype: str
    device: str
    threads: int
    store: str  # file by which the ranks find each other
    log_level: int


class Ranks:
    """Ranks 1 to N − 1. They load from when it is made, and take part once rank 0 has joined."""

    def __init__(self, path: str | Path, size: int, *, dtype: torch.dtype, device: str) -> None:
        """ConfigError if there are too few GPUs."""
        if device == "cuda" and torch.cuda.device_count() < size:
            raise ConfigError(
                f"model.tensor_parallel is {size}, and this process sees "
                f"{torch.cuda.device_count()} GPUs: reserve {size} for a replica (num_gpus), on a "
                "node that has them, or lessen it"
            )
        self.size = size
        self._device = device
        self._folder = tempfile.mkdtemp(prefix="dspark-ranks-")
        self._loss = _Loss()
        self._processes: list[RankProcess] = []
        self._shards: list[Shard] = []  # our own, once it has joined
        self._end = weakref.finalize(
            self, _end, self._loss, self._shards, self._processes, self._folder
        )
        for rank in range(1, size):
            task = RankTask(
                path=str(path),
                rank=rank,
                size=size,
                dtype=str(dtype).removeprefix("torch."),
                device="cpu" if device == "cpu" else f"cuda:{rank}",
                threads=torch.get_num_threads(),
                store=f"{self._folder}/store",
                log_level=logging.getLogger().getEffectiveLevel(),
            )
            self._processes.append(RankProcess(task))
        for process in self._processes:
            process.watch(self._loss)
        self._numbers = count()
        self._caches: weakref.WeakKeyDictionary[PagedKVCache, int] = weakref.WeakKeyDictionary()
        self._dropped: deque[int] = deque()

    def join(self) -> Shard:
        """Rank 0's own part, once all are ready; UnavailableError if one could not start."""
        for process in self._processes:
            process.await_ready()
        shard = join(f"{self._folder}/store", 0, self.size, torch.device(self._device))
        # On a thread of its own, since it may take long, and others want to be told.
        self._loss.on(lambda _: threading.Thread(target=shard.let_go, daemon=True).start())
        self._shards.append(shard)
        return shard

    def check(self) -> None:
        """UnavailableError if a rank is lost."""
        if self._loss.error is not None:
            raise self._loss.error

    @property
    def pids(self) -> list[int]:
        """Of their processes."""
        return [process.pid for process in self._processes]

    def on_lost(self, tell: Callable[[DSparkError], None]) -> None:
        """Call `tell`, on a thread of ours, when a rank is lost: no step can be run any more."""
        self._loss.on(tell)

    def close(self) -> None:
        """End them."""
        self._end()

    @contextmanager
    def step(
        self,
        token_ids: torch.Tensor,  # [T] int64, on the host, like all of it
        attention: AttentionPlan,
        logit_rows: torch.Tensor,  # [N] int64
        kv: PagedKVCache,
    ) -> Iterator[None]:
        """All ranks run a step while the body does; UnavailableError if one is lost."""
        if kv not in self._caches:
            self._caches[kv] = next(self._numbers)
            weakref.finalize(kv, self._dropped.append, self._caches[kv]).atexit = False
        dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
        message = StepMessage(
            self._caches[kv], kv.num_pages, dropped, token_ids, attention, logit_rows
        )
        with self._running(message.to_bytes()):
            yield

    @contextmanager
    def whole(self, texts: Sequence[torch.Tensor], logit_rows: torch.Tensor) -> Iterator[None]:
        """The same for TargetModel.forward_whole."""
        with self._running(WholeMessage(list(texts), logit_rows).to_bytes()):
            yield

    @contextmanager
    def _running(self, content: bytes) -> Iterator[None]:
        self.check()
        try:
            for process in self._processes:
                process.send(content)
            yield
        except BaseException as error:  # whatever it is, ranks are no longer at the same place
            if isinstance(error, Exception):  # a sum fails before the process is seen to be gone
                self._loss.happened.wait(_SEEN_S)
            self._loss.tell(
                UnavailableError(
                    f"a step of the target failed on rank 0 of {self.size}, and the other ranks "
                    f"cannot go on without it: {error}"
                )
            )
            if not isinstance(error, Exception):
                raise
            assert self._loss.error is not None
            raise self._loss.error from error


class RankProcess:
    """One of them, and this process's end of its socket."""

    def __init__(self, task: RankTask) -> None:
        self._name = f"rank {task.rank} of {task.size} of the target"
        self._socket, theirs = socket.socketpair()
        with theirs:
            path = os.pathsep.join(part or os.getcwd() for part in sys.path)
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "dspark.models.rank_worker"),
                    *(str(theirs.fileno()), json.dumps(asdict(task))),
                ],
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def watch(self, loss: _Loss) -> None:
        """Tell `loss` when it ends, from a thread of its own."""

        def wait() -> None:
            status = self._process.wait()
            loss.tell(
                UnavailableError(
                    f"{self._name} (process {self.pid}) ended with status {status}, and the others "
                    "cannot go on without it; what it logged before says why"
                )
            )

        threading.Thread(target=wait, name=f"watch {self._name}", daemon=True).start()

    def await_ready(self) -> None:
        """Wait until it has loaded its part; UnavailableError if it could not."""
        try:
            problem = receive(self._socket).decode(errors="replace")
        except (EOFError, OSError):
            problem = f"process {self.pid} has ended; what it logged before says why"
        if problem:
            raise UnavailableError(f"{self._name} did not start: {problem}")
        self._socket.settimeout(TIMEOUT_S)

    def send(self, content: bytes) -> None:
        """Tell it what to run; OSError if it does not take that."""
        send(self._socket, content)

    def end(self) -> None:
        """End it, if it has not."""
        self._socket.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _Loss:
    """That a rank was lost: the first word on it stands, and is passed on once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: list[Callable[[DSparkError], None]] = []
        self.error: DSparkError | None = None
        self.happened = threading.Event()

    def on(self, tell: Callable[[DSparkError], None]) -> None:
        with self._lock:
            self._listeners.append(tell)
            error = self.error
        if error is not None:
            tell(error)

    def tell(self, error: DSparkError) -> None:
        with self._lock:
            if self.error is not None:
                return
            self.error = error
            listeners = list(self._listeners)
        log.error("%s", error)
        self.happened.set()
        for listener in listeners:
            listener(error)

    def close(self) -> None:
        """From now on ranks end because they should."""
        with self._lock:
            self.error = self.error or UnavailableError("this target was closed: load it again")


def join(store: str, rank: int, size: int, device: torch.device) -> Shard:
    """Meet the other ranks, each of which calls this; RuntimeError if one does not come."""
    # A group of its own rather than torch's default one: a process may have several targets.
    meeting, limit = c10d.FileStore(store, size), timedelta(seconds=TIMEOUT_S)
    if device.type == "cuda":
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # they are of one machine
        nccl = c10d.ProcessGroupNCCL.Options()
        nccl._timeout = limit
        group = c10d.ProcessGroupNCCL(meeting, rank, size, nccl)
    else:
        gloo = c10d.ProcessGroupGloo._Options()
        gloo._timeout = limit
        gloo._devices = [c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        group = c10d.ProcessGroupGloo(meeting, rank, size, gloo)

    def add_up(tensor: torch.Tensor) -> None:
        group.allreduce([tensor]).wait()

    # Kernels of NCCL wait on the device, where nobody sees it, until its watchdog takes the whole
    # process down. A sum of gloo's fails by itself when a connection closes.
    return Shard(rank, size, add_up, group.abort if device.type == "cuda" else lambda: None)


def _end(
    loss: _Loss, shards: Sequence[Shard], processes: Sequence[RankProcess], folder: str
) -> None:
    loss.close()
    for shard in shards:
        shard.let_go()  # NCCL would take leave of ranks that are gone, and wait for them
    for process in processes:
        process.end()
    shutil.rmtree(folder, ignore_errors=True)
