"""How fast a link is where no blob has told lately: the service Link, and what asks it."""

import os
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from kvferry.cluster.handlers import stream
from kvferry.cluster.server import Service
from kvferry.cluster.status import rpc_errors
from kvferry.errors import ProtocolError, QueueFullError
from kvferry.proto.v1 import link_pb2
from kvferry.proto.v1.link_pb2_grpc import LinkStub

if TYPE_CHECKING:
    from kvferry.proto.v1.link_pb2_grpc import LinkAsyncStub

SERVICE = "kvferry.v1.Link"
PROBE_BYTES = 1 << 20
MAX_PROBE_BYTES = 4 << 20
PIECE_BYTES = 1 << 18
# Several at a time would measure each other.
MAX_AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class Probed:
    """What a probe found."""

    bytes_per_s: float
    latency_s: float


class LinkServicer:
    """Sends bytes that no link can compress."""

    def __init__(self) -> None:
        self._piece = os.urandom(PIECE_BYTES)
        self._running = 0

    async def probe(
        self, request: link_pb2.ProbeRequest
    ) -> AsyncGenerator[link_pb2.ProbeReply, None]:
        """Probe."""
        if request.bytes > MAX_PROBE_BYTES:
            raise ProtocolError(f"a probe of {request.bytes:,} bytes: at most {MAX_PROBE_BYTES:,}")
        if self._running >= MAX_AT_ONCE:
            raise QueueFullError("link probes", MAX_AT_ONCE)
        self._running += 1
        try:
            for start in range(0, request.bytes, PIECE_BYTES):
                yield link_pb2.ProbeReply(data=self._piece[: request.bytes - start])
        finally:
            self._running -= 1


def link_service(on_failure: Callable[[str], None]) -> Service:
    """To be given to `kvferry.cluster.server.start_server`."""
    handlers = {"Probe": stream(LinkServicer().probe, link_pb2.ProbeRequest, on_failure)}
    generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
    return Service(SERVICE, lambda server: server.add_generic_rpc_handlers((generic,)))


async def probe(
    channel: grpc.aio.Channel, where: str, timeout_s: float, size: int = PROBE_BYTES
) -> Probed:
    """Measure the way from the other end to here with ``size`` bytes.

    Raises: StoreUnavailableError, StoreTimeoutError, QueueFullError, ProtocolError (also
        from an older release, which has no such service).
    """
    stub: LinkAsyncStub = LinkStub(channel)
    with rpc_errors(where):
        await _take(stub, 1, timeout_s)  # connects, if need be
        started = time.monotonic()
        await _take(stub, 1, timeout_s)
        latency_s = time.monotonic() - started
        started = time.monotonic()
        got = await _take(stub, size, timeout_s)
        seconds = time.monotonic() - started
    if got != size:
        raise ProtocolError(f"{where}: {got:,} bytes came where {size:,} were asked for")
    return Probed(size / max(seconds, 1e-6), latency_s)


async def _take(stub: "LinkAsyncStub", size: int, timeout_s: float) -> int:
    got = 0
    async for reply in stub.Probe(link_pb2.ProbeRequest(bytes=size), timeout=timeout_s):
        got += len(reply.data)
    return got
