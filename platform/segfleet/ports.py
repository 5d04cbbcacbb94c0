"""Ports of this machine that nobody listens on, for servers that are about to start."""

import contextlib
import random
import socket

LOWEST, HIGHEST = 20_000, 32_767
"""Above Ray's ports for workers (10002 to 19999), below those that Linux gives to a connection (32768 to 60999).

A port of the latter may be gone before the server that it was looked up for has started.
"""


def free_ports(number: int, host: str = "") -> list[int]:
    """Return as many different ports of `host` (all addresses) as nobody listens on; OSError where there are none."""
    ports: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in random.SystemRandom().sample(range(LOWEST, HIGHEST + 1), HIGHEST + 1 - LOWEST):
            if len(ports) == number:
                return ports
            with contextlib.suppress(OSError):
                stack.enter_context(socket.socket()).bind((host, port))
                ports.append(port)
    raise OSError(f"{number} ports between {LOWEST} and {HIGHEST} must be free, but {len(ports)} are.")
