"""The calls on etcd that the cluster needs, with deadlines, failover and our errors."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, Self, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from kvferry.cluster.etcd import operations as ops
from kvferry.cluster.etcd.access import EtcdAccess, open_channels
from kvferry.cluster.status import error_from_rpc, rpc_errors
from kvferry.errors import FerryError, ProtocolError, StoreTimeoutError, StoreUnavailableError
from kvferry.proto.v1 import etcd_pb2 as pb

TIMEOUT_S = 5.0
ATTEMPT_S = 1.0
PAUSE_S = 0.05

_HAS_LEADER = ("hasleader", "true")  # a member cut off from the others says so at once
_R = TypeVar("_R", bound=Message)
_T = TypeVar("_T")


class EtcdClient:
    """One etcd, through any of its members. Belongs to one event loop.

    A call that fails goes to the next member until its time is over. So a transaction may
    have been carried out although an attempt at it failed, and must be one that finds its
    own traces (see `Election`, `EtcdIntentStore`). Reads are linearizable. Raises in every
    call: StoreUnavailableError, StoreTimeoutError; ProtocolError for a call that etcd
    refuses.
    """

    def __init__(
        self, access: EtcdAccess, *, timeout_s: float = TIMEOUT_S, attempt_s: float = ATTEMPT_S
    ) -> None:
        """``timeout_s``: of a call, over as many members as it takes; ``attempt_s``: at one."""
        self._access = access
        self._timeout_s, self._attempt_s = timeout_s, attempt_s
        self._channels = open_channels(access)
        self._at = 0
        self._token = ""
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections; calls under way fail."""
        self._closed = True
        for channel in self._channels:
            await channel.close()

    async def get(self, key: bytes) -> ops.Found:
        """One key, or none."""
        return await self._range(pb.RangeRequest(key=key))

    async def list(self, prefix: bytes, limit: int = 1024) -> ops.Found:
        """Keys that begin with ``prefix``, in order, at most ``limit``."""
        return await self._range(
            pb.RangeRequest(key=prefix, range_end=ops.end_of(prefix), limit=limit)
        )

    async def _range(self, request: pb.RangeRequest) -> ops.Found:
        reply = await self._unary("KV/Range", request, pb.RangeResponse)
        return ops.Found(tuple(map(ops.to_item, reply.kvs)), reply.header.revision)

    async def transact(
        self,
        when: Sequence[ops.Compare],
        then: Sequence[ops.Operation],
        otherwise: Sequence[ops.Operation] = (),
    ) -> ops.Outcome:
        """Carry out ``then`` where all of ``when`` hold, else ``otherwise``; all at once."""
        request = pb.TxnRequest(compare=when, success=then, failure=otherwise)
        return ops.to_outcome(await self._unary("KV/Txn", request, pb.TxnResponse))

    async def grant(self, ttl_s: int) -> tuple[int, float]:
        """A new lease, and how long it lives in seconds: at least what was asked."""
        reply = await self._unary(
            "Lease/LeaseGrant", pb.LeaseGrantRequest(TTL=ttl_s), pb.LeaseGrantResponse
        )
        if reply.error or not reply.ID:
            raise StoreUnavailableError(self.where, f"no lease: {reply.error or 'no id'}")
        return reply.ID, float(reply.TTL)

    async def keep_alive(self, lease: int) -> float:
        """Seconds that the lease lives from now on; 0: it is over."""

        async def attempt(channel: grpc.aio.Channel, timeout_s: float) -> float:
            call = self._stream(channel, "Lease/LeaseKeepAlive", pb.LeaseKeepAliveResponse)
            opened = call(timeout=timeout_s, metadata=self._metadata())
            try:
                await opened.write(pb.LeaseKeepAliveRequest(ID=lease))
                reply = await opened.read()
            finally:
                opened.cancel()
            if not isinstance(reply, pb.LeaseKeepAliveResponse):
                raise StoreUnavailableError(self.where, "it ended the lease's stream")
            return max(0.0, float(reply.TTL))

        return await self._try(attempt)

    async def revoke(self, lease: int) -> None:
        """End a lease and delete its keys; one that is over already is no error."""
        try:
            await self._unary(
                "Lease/LeaseRevoke", pb.LeaseRevokeRequest(ID=lease), pb.LeaseRevokeResponse
            )
        except StoreUnavailableError as exc:
            if "lease not found" not in exc.problem:
                raise

    async def watch(
        self, key: bytes, after: int, *, prefix: bool = False
    ) -> AsyncGenerator[tuple[ops.Change, ...], None]:
        """Changes of a key, or of all that begin with it, later than revision ``after``.

        Never ends by itself; whoever iterates reads anew and watches again after an error.
        A member that stands still is not noticed for seconds, so do not wait on it alone.
        """
        request = pb.WatchRequest(
            create_request=pb.WatchCreateRequest(
                key=key, range_end=ops.end_of(key) if prefix else b"", start_revision=after + 1
            )
        )
        at = self._at
        call = self._stream(self._channels[at], "Watch/Watch", pb.WatchResponse)
        opened = call(metadata=self._metadata())
        try:
            with rpc_errors(self.where):
                await opened.write(request)
            while True:
                with rpc_errors(self.where):
                    reply = await opened.read()
                if not isinstance(reply, pb.WatchResponse) or reply.canceled:
                    why = getattr(reply, "cancel_reason", "") or "it ended the watch"
                    raise StoreUnavailableError(self.where, why)
                if reply.events:
                    yield tuple(
                        ops.Change(ops.to_item(event.kv), event.type == pb.Event.DELETE)
                        for event in reply.events
                    )
        except StoreUnavailableError:
            self._token = ""  # it may be that it has expired
            self._leave(at)
            raise
        finally:
            opened.cancel()

    @property
    def where(self) -> str:
        """For messages: etcd, and the member that is asked now."""
        return f"etcd at {self._access.endpoints[self._at].address}"

    # -- one call, over the members -------------------------------------------------

    async def _unary(self, path: str, request: Message, reply: type[_R]) -> _R:
        async def attempt(channel: grpc.aio.Channel, timeout_s: float) -> _R:
            call: Any = channel.unary_unary(
                f"/etcdserverpb.{path}",
                request_serializer=type(request).SerializeToString,
                response_deserializer=reply.FromString,
            )
            answer: _R = await call(request, timeout=timeout_s, metadata=self._metadata())
            return answer

        return await self._try(attempt)

    @staticmethod
    def _stream(channel: grpc.aio.Channel, path: str, reply: type[Message]) -> Any:
        return channel.stream_stream(
            f"/etcdserverpb.{path}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply.FromString,
        )

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (_HAS_LEADER, ("token", self._token)) if self._token else (_HAS_LEADER,)

    def _leave(self, at: int) -> None:
        """Ask the next member from now on, unless somebody moved on already."""
        if at == self._at:
            self._at = (at + 1) % len(self._channels)

    async def _try(self, attempt: Callable[[grpc.aio.Channel, float], Awaitable[_T]]) -> _T:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._timeout_s
        error: FerryError = StoreTimeoutError(self.where, "no answer within the deadline")
        tried = 0
        while (left := end - loop.time()) > 0 and not self._closed:
            at = self._at
            try:
                if self._access.user and not self._token:
                    await self._authenticate(self._channels[at], min(left, self._attempt_s))
                return await attempt(self._channels[at], min(left, self._attempt_s))
            except grpc.RpcError as exc:
                error = error_from_rpc(self.where, exc)
                if not self._again(exc):
                    raise error from exc
            except StoreUnavailableError as exc:
                error = exc
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if self._closed or task is None or task.cancelling():
                    raise
                error = StoreUnavailableError(self.where, "the connection was lost")
            self._leave(at)
            tried += 1
            if tried % len(self._channels) == 0:
                await asyncio.sleep(PAUSE_S * min(10, tried))
        raise error

    def _again(self, exc: grpc.RpcError) -> bool:
        """Whether another attempt may fare better."""
        code = exc.code() if hasattr(exc, "code") else None
        if code is grpc.StatusCode.UNAUTHENTICATED and self._token:
            self._token = ""  # it has expired
            return True
        return code in (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.StatusCode.CANCELLED,
            grpc.StatusCode.UNKNOWN,  # "context deadline exceeded", where etcd has no leader
        )

    async def _authenticate(self, channel: grpc.aio.Channel, timeout_s: float) -> None:
        call: Any = channel.unary_unary(
            "/etcdserverpb.Auth/Authenticate",
            request_serializer=pb.AuthenticateRequest.SerializeToString,
            response_deserializer=pb.AuthenticateResponse.FromString,
        )
        request = pb.AuthenticateRequest(name=self._access.user, password=self._access.password)
        reply: pb.AuthenticateResponse = await call(request, timeout=timeout_s)
        if not reply.token:
            raise ProtocolError(f"{self.where} gave user {self._access.user!r} no token")
        self._token = reply.token
