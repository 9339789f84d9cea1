"""Three verifiers and two drafters on local Ray with a real Redis, under load, and faults in turn.

One verifier and one drafter reach the scheduler through a relay, so that the network between can be
cut. All else is as `dspark serve` has it.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import psutil
import ray
import redis
from helpers import elsewhere
from helpers.fault_load import Ask, Load
from helpers.ports import free_ports
from helpers.redis_server import RedisServer, running_redis
from helpers.relay import Relay
from helpers.tiny import save_models
from ray import serve

from dspark.applications import SCHEDULER
from dspark.cli.local_cluster import LocalCluster
from dspark.config import EngineConfig, GatewayConfig, ModelConfig, SchedulerConfig, ServeConfig
from dspark.pb import scheduler_pb2 as pb
from dspark.pb import scheduler_pb2_grpc

VERIFIERS, DRAFTS = 3, 2
_POLL_S = 0.1
_PATIENCE_S = 120.0  # until a fault counts as not recovered from
_BACK_PATIENCE_S = 20.0  # the same of the tokens a second, once the pool is whole
_FAR = "-far"  # ends the names of the applications behind the relays
ASKS = (
    Ask("one two three"),
    Ask("one two three", seed=7),
    Ask("the quick brown fox"),
    Ask("answer the question", seed=11),
    Ask("some more English text about numbers"),
    Ask("hello", seed=13),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one fault did. Times in seconds; infinite: not within the drill's patience."""

    fault: str
    lasted_s: float  # until the drill ended it; 0 of what Ray has to mend
    requests: int  # that were under way at some time between the fault and the recovery
    failed: int
    longest_wait_s: float  # of any client for its next token
    rate_before: float  # tokens/s of all clients, in the seconds before
    slowest_rate: float  # in the slowest window afterwards
    back_s: float  # since the fault: a window of `WINDOW_S` after the slowest has `BACK` of ...
    level: float  # ... this rate: the one before, times the share of the verifiers that are left
    drafting_s: float  # since the fault: from then on each verifier verifies drafts; see _Drafting
    whole_s: float  # since the fault's end: all are on its list and draft, and none that is gone
    noticed: bool  # whether the pool was ever seen not to be whole
    accepted_before: int  # draft tokens, in answers that ended before the fault
    accepted_after: int  # and in those that began after the recovery
    failures: tuple[str, ...]

    @property
    def recovered(self) -> bool:
        """Whether the pool came to be whole again, with drafts."""
        return self.whole_s < math.inf

    @property
    def conclusive(self) -> bool:
        """Whether a fault was seen, and drafts that it could disturb: accepted before and after."""
        return self.noticed and self.accepted_before > 0 and self.accepted_after > 0


class Drill:
    """A running cluster under load, and what can be done to it."""

    def __init__(
        self,
        redis_server: RedisServer,
        load: Load,
        relays: Mapping[str, Relay],
        locate: Callable[[], str],
        steady_s: float,
        log: Callable[[str], None],
    ) -> None:
        self.load, self._locate, self._steady_s = load, locate, steady_s
        self._redis, self._relays, self._log = redis_server, relays, log
        self._gone: set[str] = set()  # incarnations that must not be listed any more

    # -- faults ---------------------------------------------------------------------------------

    def kill_verifier(self) -> Outcome:
        """One of three gets SIGKILL."""
        victim = self._near(pb.ROLE_VERIFIER)
        return self._measure(
            "verifier killed",
            lambda: self._kill(victim),
            level=(VERIFIERS - 1) / VERIFIERS,
        )

    def kill_drafter(self) -> Outcome:
        """One of two gets SIGKILL."""
        victim = self._near(pb.ROLE_DRAFT)
        return self._measure("drafter killed", lambda: self._kill(victim))

    def hang_drafter(self, for_s: float) -> Outcome:
        """One of two gets SIGSTOP, and SIGCONT after a time."""
        process = _process_of(self._near(pb.ROLE_DRAFT).address)
        return self._measure("drafter hung", process.suspend, process.resume, for_s)

    def hang_drafter_for_good(self) -> Outcome:
        """One of two gets SIGSTOP, and Ray has to replace it."""
        victim = self._near(pb.ROLE_DRAFT)

        def hang() -> None:
            self._gone.add(victim.incarnation)
            _process_of(victim.address).suspend()

        return self._measure("drafter hung for good", hang)

    def hang_verifier(self, for_s: float) -> Outcome:
        """One of three gets SIGSTOP, and SIGCONT after a time."""
        process = _process_of(self._near(pb.ROLE_VERIFIER).address)
        return self._measure(
            "verifier hung", process.suspend, process.resume, for_s,
            level=(VERIFIERS - 1) / VERIFIERS,
        )  # fmt: skip

    def partition(self, role: str, for_s: float) -> Outcome:
        """A `verifier` or a `draft` replica and the scheduler cannot reach each other."""
        link = self._relays[role]
        name = "drafter" if role == "draft" else role
        return self._measure(f"{name} cut off from scheduler", link.cut, link.mend, for_s)

    def kill_scheduler(self) -> Outcome:
        """It gets SIGKILL."""
        process = _process_of(self._locate())
        return self._measure("scheduler killed", process.kill)

    def pause_redis(self, for_s: float) -> Outcome:
        """It takes connections, and answers nothing."""
        return self._measure("Redis paused", self._redis.pause, self._redis.resume, for_s)

    def restart_redis(self, for_s: float, *, keep: bool) -> Outcome:
        """It stops, and starts again with its data or without."""
        name = "Redis restarted" + (" with its data" if keep else ", empty")
        return self._measure(name, lambda: self._redis.stop(keep=keep), self._redis.start, for_s)

    # -- measuring ------------------------------------------------------------------------------

    def _measure(
        self,
        name: str,
        begin: Callable[[], None],
        end: Callable[[], None] | None = None,
        for_s: float = 0.0,
        *,
        level: float = 1.0,
    ) -> Outcome:
        self.await_whole()
        time.sleep(self._steady_s)
        self._await_accepted(since=-math.inf)
        self._log(f"{name} …")
        earlier = len(self.load.ended)
        drafting, whole, noticed = _Drafting(), False, False
        began = now = time.monotonic()
        ended = began if end is None else math.inf
        begin()
        while not whole and now < began + for_s + _PATIENCE_S:
            time.sleep(_POLL_S)
            if end is not None and ended == math.inf and now >= began + for_s:
                end()
                ended = time.monotonic()
            state, now = self._state(), time.monotonic()
            if state is not None:
                drafting.note(state, now)
            complete = state is not None and self._is_whole(state)
            noticed |= not complete
            whole = complete and now > ended and not drafting.lacks
        time.sleep(self._steady_s)
        self._await_accepted(since=now)
        watched_from = began - self._steady_s
        before = self.load.timeline(watched_from).rate(watched_from, began)
        back_s = self._await_back(began, level * before)
        until = time.monotonic()
        timeline, over = self.load.timeline(began), list(self.load.ended)
        failures = tuple(one.failure for one in over[earlier:] if one.failure)
        return Outcome(
            fault=name,
            lasted_s=ended - began,
            requests=sum(one.asked_at < now for one in over[earlier:]),
            failed=len(failures),
            longest_wait_s=timeline.longest_wait_s(began, until),
            rate_before=before,
            slowest_rate=timeline.slowest(began, until)[1],
            back_s=back_s,
            level=level * before,
            drafting_s=math.inf if drafting.lacks else max(0.0, drafting.lacked_at - began),
            whole_s=now - ended if whole else math.inf,
            noticed=noticed,
            accepted_before=sum(one.accepted for one in over[:earlier]),
            accepted_after=sum(one.accepted for one in over if one.asked_at >= now),
            failures=failures,
        )

    def _await_accepted(self, since: float) -> None:
        """Until an answer that began after `since` had drafts accepted; not for ever."""
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            if any(one.accepted and one.asked_at >= since for one in list(self.load.ended)):
                return
            time.sleep(_POLL_S)

    def _await_back(self, since: float, level: float) -> float:
        """`Timeline.back_after_s`, once it is finite; else after a while."""
        deadline = time.monotonic() + _BACK_PATIENCE_S
        while True:
            back_s = self.load.timeline(since).back_after_s(since, time.monotonic(), level)
            if back_s < math.inf or time.monotonic() > deadline:
                return back_s
            time.sleep(0.5)

    def await_whole(self) -> None:
        """Returns once all replicas are listed; AssertionError if that does not come."""
        deadline = time.monotonic() + _PATIENCE_S
        while (state := self._state()) is None or not self._is_whole(state):
            assert time.monotonic() < deadline, f"the pool is not whole: {state}"
            time.sleep(_POLL_S)

    def _is_whole(self, state: pb.DescribeClusterResponse) -> bool:
        alive = [one for one in state.replicas if not one.draining and one.silent_ms < 2500]
        names = {one.replica.incarnation for one in state.replicas}
        roles = [one.replica.role for one in alive]
        return (
            len(alive) == len(state.replicas)
            and roles.count(pb.ROLE_VERIFIER) == VERIFIERS
            and roles.count(pb.ROLE_DRAFT) == DRAFTS
            and roles.count(pb.ROLE_GATEWAY) == 1
            and not names & self._gone
            and names <= self._stored()
        )

    def _stored(self) -> set[str]:
        """Incarnations that Redis holds."""
        try:
            with redis.Redis(
                unix_socket_path=str(self._redis.socket), socket_timeout=0.5, retry=None
            ) as client:
                return {key.decode().rpartition("/")[2] for key in client.keys("dspark/registry/*")}
        except redis.RedisError:
            return set()

    def _state(self) -> pb.DescribeClusterResponse | None:
        try:
            with grpc.insecure_channel(self._locate()) as channel:
                stub = scheduler_pb2_grpc.SchedulerStub(channel)
                return stub.DescribeCluster(pb.DescribeClusterRequest(), timeout=1.0)
        except Exception:  # Ray's errors are of many kinds, and the scheduler may be away
            return None

    def _near(self, role: pb.Role) -> pb.Replica:
        """A replica that is not behind a relay."""
        self.await_whole()
        state = self._state()
        assert state is not None
        if role == pb.ROLE_VERIFIER:
            far = serve.get_deployment_handle("verifier", "verifier" + _FAR)
            pid = _process_of(far.address.remote().result(timeout_s=30)).pid
        else:
            far = serve.get_deployment_handle("draft", "draft" + _FAR)
            pid = far.pid.remote().result(timeout_s=30)
        replicas = [s.replica for s in state.replicas if s.replica.role == role]
        return next(r for r in replicas if _process_of(r.address).pid != pid)

    def _kill(self, victim: pb.Replica) -> None:
        self._gone.add(victim.incarnation)
        _process_of(victim.address).kill()


FAULTS: Mapping[str, Callable[[Drill], Outcome]] = {
    "verifier-killed": Drill.kill_verifier,
    "verifier-hung": lambda drill: drill.hang_verifier(10.0),
    "verifier-cut-off": lambda drill: drill.partition("verifier", 12.0),  # plans lapse after 10 s
    "drafter-killed": Drill.kill_drafter,
    "drafter-hung": lambda drill: drill.hang_drafter(8.0),
    "drafter-hung-for-good": Drill.hang_drafter_for_good,
    "drafter-cut-off": lambda drill: drill.partition("draft", 12.0),
    "scheduler-killed": Drill.kill_scheduler,
    "redis-paused": lambda drill: drill.pause_redis(5.0),
    "redis-restarted": lambda drill: drill.restart_redis(5.0, keep=True),
    "redis-emptied": lambda drill: drill.restart_redis(5.0, keep=False),
}


class _Drafting:
    """Whether each verifier on the scheduler's list verifies drafts, by the reports it sends.

    One lacks drafts if less than half of its reports that came in the last second have any. One
    that sends none, being idle, cut off or dead, does not count.
    """

    def __init__(self) -> None:
        self.lacks = False  # whether one does now
        self.lacked_at = -math.inf  # when the last report came of one that did
        self._steps: dict[str, int] = {}
        self._reports: defaultdict[str, deque[tuple[float, bool]]] = defaultdict(deque)

    def note(self, state: pb.DescribeClusterResponse, now: float) -> None:
        for report in state.reports:
            if report.decode_requests and report.step != self._steps.get(report.incarnation):
                self._steps[report.incarnation] = report.step
                self._reports[report.incarnation].append((now, report.drafted > 0))
        self.lacks = False
        for listed in state.replicas:
            reports = self._reports[listed.replica.incarnation]
            while reports and reports[0][0] < now - 1.0:
                reports.popleft()
            plain = [at for at, drafted in reports if not drafted]
            if 2 * len(plain) > len(reports):
                self.lacks, self.lacked_at = True, max(self.lacked_at, plain[-1])


@contextmanager
def running_drill(
    folder: Path,
    log: Callable[[str], None],
    *,
    clients: int = 6,
    max_tokens: int = 200,
    steady_s: float = 4.0,
    lease_s: float = 5.0,
) -> Iterator[Drill]:
    """Starts everything, and the load; when it is left, what is under way has ended.

    `steady_s`: watched before each fault and after its recovery. `lease_s`: of replicas.
    """
    target, drafter = save_models(folder)
    http_port, grpc_port = free_ports(2)
    with ExitStack() as stack:
        redis_server = stack.enter_context(running_redis(folder))
        config = ServeConfig(
            model=ModelConfig(str(target), str(drafter), dtype="float32", threads=1),
            # fixed blocks, from the draft service alone: what is drafted hangs on no times
            engine=EngineConfig(
                policy="fixed", max_requests=8, cache_tokens=4096, prompt_lookup=False
            ),
            scheduler=SchedulerConfig(store_url=redis_server.url, lease_s=lease_s),
            gateway=GatewayConfig(http_port=http_port, grpc_port=grpc_port),
            verifier_replicas=VERIFIERS - 1,
            draft_replicas=DRAFTS - 1,
        )
        cluster = stack.enter_context(LocalCluster(config, log))
        locate = _locator()
        relays = {role: Relay("127.0.0.1", locate) for role in ("verifier", "draft")}
        for one in relays.values():
            stack.callback(one.close)
        _run_far(config, relays, log)
        load = Load(cluster.grpc_address, str(target), ASKS, max_tokens)
        drill = Drill(redis_server, load, relays, locate, steady_s, log)
        drill.await_whole()
        log(f"answers have {load.learn()} tokens or more")
        with load.running(clients):
            yield drill


def _run_far(config: ServeConfig, relays: Mapping[str, Relay], log: Callable[[str], None]) -> None:
    """One replica more of each, which reaches the scheduler through a relay."""
    from dspark.services.draft import app as draft
    from dspark.services.verifier import app as verifier

    log("starting a verifier and a drafter behind relays …")
    ray.cloudpickle.register_pickle_by_value(elsewhere)  # replicas do not have tests/ on their path
    one_each = replace(config, verifier_replicas=1, draft_replicas=1)
    targets: list[serve.RunTarget] = []
    for role, service in (("draft", draft), ("verifier", verifier)):
        scheduler = f"scheduler-of-{role}{_FAR}"
        settings = replace(one_each, scheduler=replace(config.scheduler, application=scheduler))
        for name, application in (
            (scheduler, elsewhere.Elsewhere.bind(relays[role].address)),
            (role + _FAR, service.deployment(settings)),
        ):
            targets.append(serve.RunTarget(application, name=name, route_prefix=None))
    serve.run_many(targets)


def _locator() -> Callable[[], str]:
    """Finds host:port of the scheduler; raises what Ray may, or TimeoutError, without one."""
    handle = serve.get_deployment_handle(SCHEDULER.name, SCHEDULER.name)

    def locate() -> str:
        address: str = handle.grpc_address.remote().result(timeout_s=2.0)
        return address

    return locate


def _process_of(address: str) -> psutil.Process:
    """The process that listens there."""
    port = int(address.rpartition(":")[2])
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            return psutil.Process(connection.pid)
    raise AssertionError(f"nobody listens at {address}")
