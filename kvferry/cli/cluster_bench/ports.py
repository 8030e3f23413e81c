"""Ports for servers that are started, killed and started again."""

import secrets
import socket
from contextlib import ExitStack

# Below those that systems give to outgoing connections (from 32768 on Linux, 49152 on macOS):
# one of those might take the port of a server that is down for a moment.
_FIRST, _END = 20_000, 32_000


def free_ports(count: int) -> list[int]:
    """Different TCP ports of 127.0.0.1 that nothing uses now."""
    found: list[int] = []
    with ExitStack() as held:
        while len(found) < count:
            probe = held.enter_context(socket.socket())
            port = _FIRST + secrets.randbelow(_END - _FIRST)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
    return found


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]
