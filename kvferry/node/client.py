"""What a hook uses of the node daemon on its machine. Synchronous, as the model is.

Every call ends within its deadline, with an answer or a `FerryError`. Reports are sent in
the background and never fail. The connection comes back by itself after the daemon does.
"""

import os
import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from pathlib import Path
from typing import Self

from kvferry.cluster.convert import MAX_KEYS
from kvferry.cluster.repository import BlobInfo, ListQuery, LookupQuery, LookupResult
from kvferry.cluster.throttle import Throttle
from kvferry.errors import FerryError, ProtocolError, StoreUnavailableError
from kvferry.node.hook_connection import HookConnection
from kvferry.node.hook_news import HookNews
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import coordinator_pb2, node_pb2

# Enough for the daemon to keep several sources busy; it bounds the bytes.
BLOBS_ASKED_FOR = 16


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
        self.throttle = Throttle(max_bytes_per_s)
        self._connection = HookConnection(self.address, timeout_s, self.throttle)
        self._blobs, self._stub = self._connection.blobs, self._connection.stub
        self._news = HookNews(self._connection, self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the daemon; calls under way fail. May be called twice."""
        self._connection.close()

    # -- blobs --------------------------------------------------------------------

    def lookup(self, query: LookupQuery, *, timeout_s: float | None = None) -> LookupResult:
        """Longest run of complete pages. ``partial``: the store could not be asked."""
        self._connection.check_open()
        return self._blobs.lookup(query, timeout_s=timeout_s)

    def has(self, keys: Sequence[BlobKey], *, timeout_s: float | None = None) -> list[bool]:
        """Which need not be put: held by the store, or on their way to it."""
        self._connection.check_open()
        return self._blobs.has(keys, timeout_s=timeout_s)

    def admit(
        self, keys: Sequence[BlobKey], *, again: bool = False, timeout_s: float | None = None
    ) -> "Sequence[node_pb2.Admission.ValueType]":
        """Which of these shall be encoded and put; any number, asked in batches.

        ``again``: the same request has offered them before. Raises: ProtocolError.
        """
        end = self._connection.deadline(timeout_s)
        found: list[node_pb2.Admission.ValueType] = []
        for at in range(0, len(keys), MAX_KEYS):
            batch = [key.to_proto() for key in keys[at : at + MAX_KEYS]]
            request = node_pb2.AdmitRequest(keys=batch, again=again)
            ask = partial(self._stub.Admit, request, timeout=end)
            answers = self._connection.run(ask, end).answers
            if len(answers) != len(batch):
                raise ProtocolError(f"{self.address}: admission answered for other keys")
            found.extend(answers)
        return found

    def get(self, key: BlobKey, *, timeout_s: float | None = None) -> bytes:
        """A whole, verified blob. Raises: BlobNotFoundError, CorruptBlobError."""
        self._connection.check_open()
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
        end = self._connection.timeout_s if deadline_s is None else max(deadline_s, 0.0)
        wanted = list(dict.fromkeys(keys))
        left = set(wanted)
        try:
            self._connection.check_open()
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
        self._connection.check_open()
        return self._blobs.put(key, data, ttl_s=ttl_s, replaces=replaces, timeout_s=timeout_s)

    def put_later(
        self, key: BlobKey, data: bytes, *, ttl_s: int = 0, replaces: BlobKey | None = None
    ) -> Future[bool]:
        """`put` that goes on by itself; its answer or error comes with the future."""
        self._connection.check_open()
        return self._blobs.put_later(key, data, ttl_s=ttl_s, replaces=replaces)

    def list(self, query: ListQuery, *, timeout_s: float | None = None) -> list[BlobInfo]:
        """What the store holds, or this node where the store cannot be asked."""
        self._connection.check_open()
        return [info for batch in self._blobs.list(query, timeout_s=timeout_s) for info in batch]

    # -- a daemon that restarts -----------------------------------------------------

    def lost(self, error: FerryError) -> bool:
        """Whether ``error`` says that the daemon itself was not there, or went away."""
        return type(error) is StoreUnavailableError and error.where == self.address

    def connected(self, timeout_s: float) -> bool:
        """Wait until the daemon is there. False: it is not, after that time."""
        return self._connection.connected(timeout_s)

    # -- the daemon ---------------------------------------------------------------

    def hello(
        self,
        shard: coordinator_pb2.ShardInfo | None = None,
        *,
        timeout_s: float | None = None,
    ) -> node_pb2.HelloReply:
        """Namespace salt (empty: not known yet), policy in force, limits."""
        request = node_pb2.HelloRequest(client=self.name, shard=shard)
        end = self._connection.deadline(timeout_s)
        return self._connection.run(lambda: self._stub.Hello(request, timeout=end), end)

    def status(self, *, timeout_s: float | None = None) -> node_pb2.NodeStatus:
        """Tiers, queue, links and counters of the daemon."""
        end = self._connection.deadline(timeout_s)
        request = node_pb2.NodeStatusRequest()
        return self._connection.run(lambda: self._stub.Status(request, timeout=end), end)

    def locate(
        self, keys: Sequence[BlobKey], *, timeout_s: float | None = None
    ) -> node_pb2.LocateReply:
        """Where each blob is to be had now; nothing is fetched."""
        request = node_pb2.LocateRequest(keys=[key.to_proto() for key in keys])
        end = self._connection.deadline(timeout_s)
        return self._connection.run(lambda: self._stub.Locate(request, timeout=end), end)

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Wait until what was put so far is in the store. False: not within the time."""
        request = node_pb2.FlushRequest(timeout_ms=int(timeout_s * 1000))
        end = timeout_s + self._connection.timeout_s
        return self._connection.run(lambda: self._stub.Flush(request, timeout=end), end).done

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
        report = node_pb2.HookReport(
            restore=restore,
            misses=dict(misses or {}),
            drops=dict(drops or {}),
            prefill_tokens_per_s=prefill_tokens_per_s,
            decode_tokens_per_s=decode_tokens_per_s,
            decode_values_per_s=decode_values_per_s or {},
            near_bytes_per_s=near_bytes_per_s,
            shard=shard,
        )
        self._news.report(report)

    def tell(
        self,
        shard: coordinator_pb2.ShardInfo,
        curve: coordinator_pb2.ModelCurve | None,
    ) -> None:
        """Say which part of a model is here, now and whenever the daemon starts anew.

        Args:
            curve: the one that the shard names; sent only where the daemon lacks it.
        """
        self._news.introduce(shard, curve)
        self.report()

    def watch(self, on_event: Callable[[node_pb2.NodeEvent], None]) -> None:
        """Call ``on_event`` for each policy, salt and trigger until `close`.

        Runs on a thread of the client's; the daemon's policy and salt come first, again
        after each reconnect. What the callback raises is logged.
        """
        self._news.watch(on_event)
