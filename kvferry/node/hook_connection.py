"""The way from a hook to its node daemon: one thread, one channel, deadlines, our errors."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import grpc.aio

from kvferry.cluster import wire
from kvferry.cluster.channel import open_channel
from kvferry.cluster.loop_thread import LoopThread
from kvferry.cluster.status import rpc_errors
from kvferry.cluster.sync_client import SyncBlobStoreClient
from kvferry.cluster.throttle import Throttle
from kvferry.errors import StoreTimeoutError, StoreUnavailableError
from kvferry.proto.v1.node_pb2_grpc import NodeStub

if TYPE_CHECKING:
    from kvferry.proto.v1.node_pb2_grpc import NodeAsyncStub

T = TypeVar("T")
# Beyond grpc's own deadline, for the way between the threads.
_SLACK_S = 1.0
_LOOK_S = 0.05


class HookConnection:
    """What a `NodeClient` speaks through; connects when first used.

    Usable from any thread but its own. Raises in every call: StoreUnavailableError.

    Args:
        address: unix:PATH or HOST:PORT.
        timeout_s: deadline of each call that is not given its own.
        throttle: of blobs that cross a link.

    Attributes:
        thread: where everything asynchronous of this connection runs.
        stub: the daemon's calls; of that thread.
        blobs: the verbs of BlobStore, from any thread.
        closed: whether `close` was called.
    """

    def __init__(self, address: str, timeout_s: float, throttle: Throttle) -> None:
        self.address, self.timeout_s = address, timeout_s
        self.closed = False
        self.thread = LoopThread("kvferry-node-client")
        self.blobs = SyncBlobStoreClient(
            address, timeout_s=timeout_s, loop_thread=self.thread, throttle=throttle
        )
        self._channel, self.stub = self.thread.run(self._connect())
        self._kept: list[asyncio.Task[None]] = []

    async def _connect(self) -> "tuple[grpc.aio.Channel, NodeAsyncStub]":
        channel = open_channel(self.address, wire.MAX_REQUEST_BYTES)
        stub: NodeAsyncStub = NodeStub(channel)
        return channel, stub

    def close(self) -> None:
        """Let go of the daemon; calls under way fail. May be called twice."""
        if self.closed:
            return
        self.closed = True
        self.thread.run(self._end_kept())
        self.blobs.close()
        self.thread.run(self._channel.close())
        self.thread.close()

    def check_open(self) -> None:
        """Raises: StoreUnavailableError: it is closed."""
        if self.closed:
            raise StoreUnavailableError(self.address, "this client is closed")

    def deadline(self, timeout_s: float | None) -> float:
        """Seconds that a call has: what it is given, else this connection's own."""
        return self.timeout_s if timeout_s is None else timeout_s

    def run(self, call: Callable[[], Awaitable[T]], deadline_s: float) -> T:
        """The answer to a call of `stub`, within its deadline.

        Raises: StoreTimeoutError, and whatever the daemon raised.
        """
        self.check_open()

        async def run() -> T:
            with rpc_errors(self.address):
                return await call()

        try:
            return self.thread.run(run(), deadline_s + _SLACK_S)
        except TimeoutError as exc:
            raise StoreTimeoutError(self.address, f"no answer in {deadline_s:.1f} s") from exc

    def keep(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Have something run in the background until `close`."""
        self.thread.run(self._keep(work))

    def connected(self, timeout_s: float) -> bool:
        """Wait until the daemon is there. False: it is not, after that time."""
        self.check_open()
        return self.thread.run(self._connected(timeout_s))

    async def _connected(self, timeout_s: float) -> bool:
        end = time.monotonic() + timeout_s
        ready = grpc.ChannelConnectivity.READY
        while True:
            # Both are asked each time: asking is what makes them connect.
            states = [c.get_state(True) for c in (self._channel, self.blobs.channel)]
            if all(state is ready for state in states):
                return True
            if time.monotonic() >= end:
                return False
            await asyncio.sleep(_LOOK_S)

    async def _keep(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._kept.append(asyncio.ensure_future(work()))

    async def _end_kept(self) -> None:
        for task in self._kept:
            task.cancel()
        await asyncio.gather(*self._kept, return_exceptions=True)
