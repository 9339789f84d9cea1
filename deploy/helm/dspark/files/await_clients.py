# Before a gateway's pod ends: wait until no client is connected, or the time given is over.
# By now the pod is no endpoint of its Service any more, so nobody new comes.
import subprocess
import sys
import time

PORTS = {8000, 50051}
ESTABLISHED = "01"


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


time.sleep(5)  # until load balancers have heard
end = time.monotonic() + float(sys.argv[1]) - 5
while connected() and time.monotonic() < end:
    time.sleep(1)
# The shell that is this container's first process passes no signal on, so Ray is stopped from here.
subprocess.run(["ray", "stop"], check=True)
