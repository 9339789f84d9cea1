"""Ports for services that other processes will bind."""

from __future__ import annotations

import random
import socket

# Below what Linux gives to outgoing connections, above what Ray gives to its workers: a port that
# is free now is still free when the gateway binds it, half a minute and many processes later.
PORTS = range(21000, 29000)


def free_ports(count: int) -> list[int]:
    held: list[socket.socket] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        one = socket.socket()
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            one.close()
            continue
        held.append(one)
        if len(held) == count:
            break
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports
