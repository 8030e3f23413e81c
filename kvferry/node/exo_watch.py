"""exo's API on this machine, asked now and then; that it is not there is nothing to report."""

import asyncio
import json
import logging
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException

from kvferry.node.exo_state import read_state
from kvferry.proto.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)

MAX_BYTES = 4 << 20
TIMEOUT_S = 3.0
PIECE_BYTES = 1 << 16
EVERY_S = 10.0
# Where nothing answers, as on most machines.
SELDOM_S = 60.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """What we ask is on this machine: nobody sends us elsewhere."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


class ExoWatch:
    """The last state that exo told of. Belongs to the event loop.

    Args:
        url: of exo's API, ``http://127.0.0.1:52415``; empty: exo is not asked.

    Attributes:
        state: ``reachable`` false: exo does not run here, or is not asked.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self.state = pb.ExoState()

    async def run(self) -> None:
        """Ask for ever."""
        while self._url:
            self.state = await asyncio.to_thread(ask_exo, self._url)
            await asyncio.sleep(EVERY_S if self.state.reachable else SELDOM_S)


def ask_exo(
    url: str, timeout_s: float = TIMEOUT_S, clock: Callable[[], float] = time.monotonic
) -> pb.ExoState:
    """exo's state; ``reachable`` false where it does not answer, or not in that way. Blocks."""
    with suppress(OSError, HTTPException, ValueError, RecursionError):
        raw = _fetch(f"{url.rstrip('/')}/state", clock() + timeout_s, clock)
        value = json.loads(raw)
        if isinstance(value, dict) and "topology" in value:
            return read_state(value)
        log.debug("%s answers, but not as exo does", url)
    return pb.ExoState()


def _fetch(url: str, end_s: float, clock: Callable[[], float]) -> bytes:
    """Raises: OSError (also when late), ValueError (also when too large)."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())
    with opener.open(url, timeout=max(0.01, end_s - clock())) as reply:
        data = bytearray()
        while piece := reply.read1(PIECE_BYTES):
            data += piece
            if len(data) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES:,} bytes")
            if clock() > end_s:
                raise TimeoutError
    return bytes(data)
