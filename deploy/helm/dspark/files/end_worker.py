"""Before a worker's pod ends: let clients be through, then have Ray move and drain its replicas.

The shell that is the container's first process passes no signal on, so that Ray is told from here.
The argument is for how many seconds clients of a gateway may go on; 0 where there are none.
"""

import os
import signal
import sys
import time

PORTS = {8000, 50051}
ESTABLISHED = "01"
HEARD_S = 5  # until load balancers know that the pod is no endpoint any more


def connected():
    """Whether anyone outside this pod is connected to the ports."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as rows:
            next(rows)
            for row in rows:
                _, local, remote, state = row.split()[:4]
                address, port = local.split(":")
                inside = remote.split(":")[0] == address
                if state == ESTABLISHED and int(port, 16) in PORTS and not inside:
                    return True
    return False


def await_clients(patience_s):
    """Until no client is connected, or the time is over."""
    end = time.monotonic() + patience_s
    time.sleep(min(HEARD_S, patience_s))
    while connected() and time.monotonic() < end:
        time.sleep(1)


def ray_start():
    """The process id of `ray start --block`; None without one."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                words = file.read().split("\0")
        except OSError:  # it has ended meanwhile
            continue
        names = [os.path.basename(word) for word in words[:3]]
        if names[1:] == ["ray", "start"] and "--block" in words:
            return int(pid)
    return None


def main():
    """Ray drains for as long as RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S lets it."""
    if (patience_s := float(sys.argv[1])) > 0:
        await_clients(patience_s)
    process = ray_start()
    if process is None:
        sys.exit("ray start --block does not run here")
    os.kill(process, signal.SIGTERM)
    while ray_start() == process:
        time.sleep(0.2)


if __name__ == "__main__":
    main()
