"""What a hook uses of the node daemon on its machine. Synchronous, as the model is.

Every call ends within its deadline, with an answer or a `FerryError`. Reports are sent in
the background and never fail. The connection comes back by itself after the daemon does.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import grpc.aio

from kvferry.cluster import wire
from kvferry.cluster.backoff import Backoff
from kvferry.cluster.channel import open_channel
from kvferry.cluster.client import rpc_errors
from kvferry.cluster.convert import MAX_KEYS
from kvferry.cluster.loop_thread import LoopThread
from kvferry.cluster.repository import BlobInfo, ListQuery, LookupQuery, LookupResult
from kvferry.cluster.sync_client import SyncBlobStoreClient
from kvferry.cluster.throttle import Throttle
from kvferry.errors import (
    FerryError,
    ProtocolError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import coordinator_pb2, node_pb2
from kvferry.proto.v1.node_pb2_grpc import NodeStub

if TYPE_CHECKING:
    from kvferry.proto.v1.node_pb2_grpc import NodeAsyncStub

log = logging.getLogger(__name__)

T = TypeVar("T")
REPORTS_UNDER_WAY = 32
# Enough for the daemon to keep several sources busy; it bounds the bytes.
BLOBS_ASKED_FOR = 16
# Beyond grpc's own deadline, for the way between the threads.
_SLACK_S = 1.0
_LOOK_S = 0.05


class NodeClient:
    """One connection to the daemon behind a Unix socket; connects when first used.

    All methods may be called from any thread but the client's own, and block the calling
    thread only. Raises in every call, beside what is named there:
    StoreUnavailableError, StoreTimeoutError, ProtocolError.

    Args:
        socket_path: the daemon's Unix socket (or HOST:PORT of a test's server).
        timeout_s: deadline of each call that is not given its own.
        name: how the daemon shall call this client; process number if empty.
        max_bytes_per_s: of blobs that cross a link; those that the daemon holds itself
            do not. 0: as fast as it goes.

    Attributes:
        throttle: where that can be changed.
    """

    def __init__(
        self,
        socket_path: str | Path,
        timeout_s: float = 30.0,
        name: str = "",
        max_bytes_per_s: float = 0.0,
    ) -> None:
        self.address = f"unix:{socket_path}" if "/" in str(socket_path) else str(socket_path)
        self.name = name or f"pid-{os.getpid()}-{secrets.token_hex(2)}"
        self._timeout_s = timeout_s
        self._closed = False
        self._reports: set[asyncio.Task[None]] = set()
        self._shard: coordinator_pb2.ShardInfo | None = None
        self._curve: coordinator_pb2.ModelCurve | None = None
        self._thread = LoopThread("kvferry-node-client")
        self.throttle = Throttle(max_bytes_per_s)
        self._blobs = SyncBlobStoreClient(
            self.address,
            timeout_s=timeout_s,
            loop_thread=self._thread,
            throttle=self.throttle,
        )
        self._channel, self._stub = self._thread.run(self._connect())
        self._watches: list[asyncio.Task[None]] = []

    async def _connect(self) -> "tuple[grpc.aio.Channel, NodeAsyncStub]":
        channel = open_channel(self.address, wire.MAX_REQUEST_BYTES)
        stub: NodeAsyncStub = NodeStub(channel)
        return channel, stub

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the daemon; calls under way fail. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._thread.run(self._stop_watching())
        self._blobs.close()
        self._thread.run(self._channel.close())
        self._thread.close()

    # -- blobs --------------------------------------------------------------------

    def lookup(self, query: LookupQuery, *, timeout_s: float | None = None) -> LookupResult:
        """Longest run of complete pages. ``partial``: the store could not be asked."""
        self._check_open()
        return self._blobs.lookup(query, timeout_s=timeout_s)

    def has(self, keys: Sequence[BlobKey], *, timeout_s: float | None = None) -> list[bool]:
        """Which need not be put: held by the store, or on their way to it."""
        self._check_open()
        return self._blobs.has(keys, timeout_s=timeout_s)

    def admit(
        self, keys: Sequence[BlobKey], *, again: bool = False, timeout_s: float | None = None
    ) -> "Sequence[node_pb2.Admission.ValueType]":
        """Which of these shall be encoded and put; any number, asked in batches.

        ``again``: the same request has offered them before. Raises: ProtocolError.
        """
        end = self._deadline(timeout_s)
        found: list[node_pb2.Admission.ValueType] = []
        for at in range(0, len(keys), MAX_KEYS):
            batch = [key.to_proto() for key in keys[at : at + MAX_KEYS]]
            request = node_pb2.AdmitRequest(keys=batch, again=again)
            answers = self._run(partial(self._stub.Admit, request, timeout=end), end).answers
            if len(answers) != len(batch):
                raise ProtocolError(f"{self.address}: admission answered for other keys")
            found.extend(answers)
        return found

    def get(self, key: BlobKey, *, timeout_s: float | None = None) -> bytes:
        """A whole, verified blob. Raises: BlobNotFoundError, CorruptBlobError."""
        self._check_open()
        return bytes(self._blobs.get(key, timeout_s=timeout_s))

    def get_many(
        self,
        keys: Sequence[BlobKey],
        deadline_s: float | None = None,
        *,
        parallel: int = BLOBS_ASKED_FOR,
    ) -> dict[BlobKey, memoryview | FerryError]:
        """Whole, verified blobs; in place of one that failed, its error. Never raises.

        ``deadline_s``: for all of them together, from now; what is late is an error.
        """
        found = dict(self.get_each(keys, deadline_s, parallel=parallel))
        return {key: found[key] for key in keys}

    def get_each(
        self,
        keys: Sequence[BlobKey],
        deadline_s: float | None = None,
        *,
        parallel: int = BLOBS_ASKED_FOR,
    ) -> Generator[tuple[BlobKey, memoryview | FerryError], None, None]:
        """`get_many` as the blobs come: each key once, with its blob or its error.

        They are fetched in the order of ``keys``, and go on while the caller works on what
        is there; closing the iterator ends it. Never raises.
        """
        end = self._timeout_s if deadline_s is None else max(deadline_s, 0.0)
        wanted = list(dict.fromkeys(keys))
        left = set(wanted)
        try:
            self._check_open()
            for index, found in self._blobs.get_each(wanted, parallel=parallel, timeout_s=end):
                left.discard(wanted[index])
                yield wanted[index], found
            problem: FerryError | None = None
        except FerryError as exc:
            problem = exc
        except CancelledError:
            problem = StoreUnavailableError(self.address, "this client is closed")
        if problem is not None:
            for key in wanted:
                if key in left:
                    yield key, problem

    def put(
        self,
        key: BlobKey,
        data: bytes | memoryview,
        *,
        ttl_s: int = 0,
        replaces: BlobKey | None = None,
        timeout_s: float | None = None,
    ) -> bool:
        """Hand a blob over; the daemon uploads it. False: it was there already.

        Raises: QueueFullError, StoreFullError, CorruptBlobError, IdentityMismatchError.
        """
        self._check_open()
        return self._blobs.put(key, data, ttl_s=ttl_s, replaces=replaces, timeout_s=timeout_s)

    def put_later(
        self, key: BlobKey, data: bytes, *, ttl_s: int = 0, replaces: BlobKey | None = None
    ) -> Future[bool]:
        """`put` that goes on by itself; its answer or error comes with the future."""
        self._check_open()
        return self._blobs.put_later(key, data, ttl_s=ttl_s, replaces=replaces)

    def list(self, query: ListQuery, *, timeout_s: float | None = None) -> list[BlobInfo]:
        """What the store holds, or this node where the store cannot be asked."""
        self._check_open()
        return [info for batch in self._blobs.list(query, timeout_s=timeout_s) for info in batch]

    # -- a daemon that restarts -----------------------------------------------------

    def lost(self, error: FerryError) -> bool:
        """Whether ``error`` says that the daemon itself was not there, or went away."""
        return type(error) is StoreUnavailableError and error.where == self.address

    def connected(self, timeout_s: float) -> bool:
        """Wait until the daemon is there. False: it is not, after that time."""
        self._check_open()
        return self._thread.run(self._connected(timeout_s))

    # -- the daemon ---------------------------------------------------------------

    def hello(
        self,
        shard: coordinator_pb2.ShardInfo | None = None,
        *,
        timeout_s: float | None = None,
    ) -> node_pb2.HelloReply:
        """Namespace salt (empty: not known yet), policy in force, limits."""
        request = node_pb2.HelloRequest(client=self.name, shard=shard)
        end = self._deadline(timeout_s)
        return self._run(lambda: self._stub.Hello(request, timeout=end), end)

    def status(self, *, timeout_s: float | None = None) -> node_pb2.NodeStatus:
        """Tiers, queue, links and counters of the daemon."""
        end = self._deadline(timeout_s)
        request = node_pb2.NodeStatusRequest()
        return self._run(lambda: self._stub.Status(request, timeout=end), end)

    def locate(
        self, keys: Sequence[BlobKey], *, timeout_s: float | None = None
    ) -> node_pb2.LocateReply:
        """Where each blob is to be had now; nothing is fetched."""
        request = node_pb2.LocateRequest(keys=[key.to_proto() for key in keys])
        end = self._deadline(timeout_s)
        return self._run(lambda: self._stub.Locate(request, timeout=end), end)

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Wait until what was put so far is in the store. False: not within the time."""
        request = node_pb2.FlushRequest(timeout_ms=int(timeout_s * 1000))
        end = timeout_s + self._timeout_s
        return self._run(lambda: self._stub.Flush(request, timeout=end), end).done

    def report(
        self,
        *,
        restore: coordinator_pb2.RestoreReport | None = None,
        misses: Mapping[str, int] | None = None,
        drops: Mapping[str, int] | None = None,
        prefill_tokens_per_s: float = 0.0,
        decode_tokens_per_s: float = 0.0,
        decode_values_per_s: Mapping[str, float] | None = None,
        near_bytes_per_s: float = 0.0,
        shard: coordinator_pb2.ShardInfo | None = None,
    ) -> None:
        """Tell the daemon what happened; in the background, lost where it is not there."""
        if self._closed or len(self._reports) >= REPORTS_UNDER_WAY:
            return
        report = node_pb2.HookReport(
            client=self.name,
            restore=restore,
            misses=dict(misses or {}),
            drops=dict(drops or {}),
            prefill_tokens_per_s=prefill_tokens_per_s,
            decode_tokens_per_s=decode_tokens_per_s,
            decode_values_per_s=decode_values_per_s or {},
            near_bytes_per_s=near_bytes_per_s,
            shard=shard or self._shard,
        )
        self._thread.run(self._report_later(report))

    def tell(
        self,
        shard: coordinator_pb2.ShardInfo,
        curve: coordinator_pb2.ModelCurve | None,
    ) -> None:
        """Say which part of a model is here, now and whenever the daemon starts anew.

        Args:
            curve: the one that the shard names; sent only where the daemon lacks it.
        """
        self._shard, self._curve = shard, curve
        self.report()

    def watch(self, on_event: Callable[[node_pb2.NodeEvent], None]) -> None:
        """Call ``on_event`` for each policy, salt and trigger until `close`.

        Runs on a thread of the client's; the daemon's policy and salt come first, again
        after each reconnect. What the callback raises is logged.
        """
        self._check_open()
        self._thread.run(self._start_watching(on_event))

    # -- inside -------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailableError(self.address, "this client is closed")

    def _deadline(self, timeout_s: float | None) -> float:
        return self._timeout_s if timeout_s is None else timeout_s

    def _run(self, call: Callable[[], Awaitable[T]], deadline_s: float) -> T:
        self._check_open()

        async def run() -> T:
            with rpc_errors(self.address):
                return await call()

        try:
            return self._thread.run(run(), deadline_s + _SLACK_S)
        except TimeoutError as exc:
            raise StoreTimeoutError(self.address, f"no answer in {deadline_s:.1f} s") from exc

    async def _connected(self, timeout_s: float) -> bool:
        end = time.monotonic() + timeout_s
        ready = grpc.ChannelConnectivity.READY
        while True:
            # Both are asked each time: asking is what makes them connect.
            states = [c.get_state(True) for c in (self._channel, self._blobs.channel)]
            if all(state is ready for state in states):
                return True
            if time.monotonic() >= end:
                return False
            await asyncio.sleep(_LOOK_S)

    async def _report_later(self, report: node_pb2.HookReport) -> None:
        task = asyncio.ensure_future(self._send(report))
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)

    async def _send(self, report: node_pb2.HookReport) -> None:
        try:
            with rpc_errors(self.address):
                reply = await self._stub.Report(report, timeout=self._timeout_s)
                if reply.curve_wanted and self._curve is not None:
                    told = node_pb2.HookReport(
                        client=self.name, shard=self._shard, curve=self._curve
                    )
                    await self._stub.Report(told, timeout=self._timeout_s)
        except FerryError as exc:
            log.debug("report lost: %s", exc)

    async def _start_watching(self, on_event: Callable[[node_pb2.NodeEvent], None]) -> None:
        self._watches.append(asyncio.ensure_future(self._watch(on_event)))

    async def _stop_watching(self) -> None:
        for task in self._watches:
            task.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)

    async def _watch(self, on_event: Callable[[node_pb2.NodeEvent], None]) -> None:
        backoff = Backoff(first_s=0.1, most_s=5.0)
        while True:
            with contextlib.suppress(FerryError), rpc_errors(self.address):
                request = node_pb2.WatchEventsRequest(client=self.name)
                told = self._shard is None
                async for event in self._stub.WatchEvents(request):
                    backoff.reset()
                    if not told:  # a daemon that started anew knows nothing of this hook
                        told = True
                        shard = node_pb2.HookReport(client=self.name, shard=self._shard)
                        await self._report_later(shard)
                    await asyncio.to_thread(_deliver, on_event, event)
            await asyncio.sleep(backoff.next_s())


def _deliver(on_event: Callable[[node_pb2.NodeEvent], None], event: node_pb2.NodeEvent) -> None:
    try:
        on_event(event)
    except Exception:
        log.exception("the callback for node events failed")
