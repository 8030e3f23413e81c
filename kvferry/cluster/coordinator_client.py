"""What nodes and commands call on the coordinator, with deadlines and our errors."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from typing import TYPE_CHECKING, Self, TypeVar

import grpc
import grpc.aio

from kvferry.cluster.channel import open_channel
from kvferry.cluster.client import rpc_errors
from kvferry.cluster.credentials import PLAINTEXT, Credentials
from kvferry.cluster.wire import MAX_REQUEST_BYTES
from kvferry.errors import StoreTimeoutError, StoreUnavailableError
from kvferry.proto.v1 import coordinator_pb2 as pb
from kvferry.proto.v1.coordinator_pb2_grpc import CoordinatorStub

if TYPE_CHECKING:
    from kvferry.proto.v1.coordinator_pb2_grpc import CoordinatorAsyncStub

REQUEST_TIMEOUT_S = 5.0
# The coordinator repeats the policy every `REPEAT_S`, so silence means that it is gone.
REPEAT_S = 15.0
WATCH_SILENCE_S = 45.0

_Reply = TypeVar("_Reply")


class CoordinatorClient:
    """One channel to one coordinator at HOST:PORT; connects when first used.

    Usable from one event loop. Raises in every call, beside what is named there:
    StoreUnavailableError, StoreTimeoutError, ProtocolError.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = REQUEST_TIMEOUT_S,
        credentials: Credentials = PLAINTEXT,
    ) -> None:
        """``timeout_s``: deadline of each call; the policy watch has none."""
        self.address = address
        self._where = f"coordinator {address}"
        self._timeout_s = timeout_s
        self._channel = open_channel(address, MAX_REQUEST_BYTES, credentials)
        self._stub: CoordinatorAsyncStub = CoordinatorStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the channel; calls under way fail with StoreUnavailableError."""
        await self._channel.close()

    async def register(self, request: pb.RegisterRequest) -> pb.RegisterReply:
        """Join, or join again: salt of the namespace, peers, heartbeat interval.

        Raises: FencedError where a later incarnation of this node id has registered.
        """
        return await self._answer(self._stub.Register(request, timeout=self._timeout_s))

    async def heartbeat(self, request: pb.HeartbeatRequest) -> pb.HeartbeatReply:
        """``known`` false: the coordinator has forgotten this node, register again.

        Raises: FencedError as `register`.
        """
        return await self._answer(self._stub.Heartbeat(request, timeout=self._timeout_s))

    async def goodbye(self, request: pb.GoodbyeRequest, *, timeout_s: float | None = None) -> None:
        """Say that this node sleeps, or ends. Raises: FencedError as `register`."""
        end = self._timeout_s if timeout_s is None else timeout_s
        await self._answer(self._stub.Goodbye(request, timeout=end))

    async def drain(self, node_id: str, *, undo: bool = False) -> pb.DrainReply:
        """Have a node hand over and take nothing new; ``undo``: have it back at work.

        Raises: ConfigError: no such member.
        """
        request = pb.DrainRequest(node_id=node_id, undo=undo)
        return await self._answer(self._stub.Drain(request, timeout=self._timeout_s))

    async def watch_policy(self, node_id: str) -> AsyncGenerator[pb.Policy, None]:
        """The policy in force at once, then each later one. Never ends by itself.

        Whoever iterates comes back after an error. Versions never go back, also over
        restarts of the coordinator.

        Raises: StoreUnavailableError also when the coordinator ends the stream.
        """
        call = self._stub.WatchPolicy(pb.WatchPolicyRequest(node_id=node_id))
        seen = 0
        try:
            while True:
                policy = await self._next(call)
                if policy.version > seen:
                    seen = policy.version
                    yield policy
        finally:
            call.cancel()

    async def report_restore(self, report: pb.RestoreReport) -> None:
        """Tell how a restore went; for metrics, and later for decisions."""
        await self._answer(self._stub.ReportRestore(report, timeout=self._timeout_s))

    async def explain(self, layers: int, model_id: bytes = b"") -> pb.ExplainReply:
        """The policy in force, and for each of ``layers`` why it is coded as it is."""
        request = pb.ExplainRequest(layers=layers, model=model_id.hex())
        return await self._answer(self._stub.Explain(request, timeout=self._timeout_s))

    async def set_policy(self, policy: pb.Policy) -> int:
        """Put ``policy`` in force; the version that it got.

        Raises: ConfigError for a policy that the coordinator refuses.
        """
        request = pb.SetPolicyRequest(policy=policy)
        call = self._stub.SetPolicy(request, timeout=self._timeout_s)
        return int((await self._answer(call)).version)

    async def members(self) -> pb.MembersReply:
        """Who is registered, in which state, and their last heartbeats."""
        request = pb.MembersRequest()
        return await self._answer(self._stub.Members(request, timeout=self._timeout_s))

    async def _next(
        self, call: "grpc.aio.UnaryStreamCall[pb.WatchPolicyRequest, pb.Policy]"
    ) -> pb.Policy:
        try:
            async with asyncio.timeout(WATCH_SILENCE_S):
                policy = await self._answer(call.read())
        except TimeoutError as exc:
            problem = f"silent for {WATCH_SILENCE_S:.0f} s"
            raise StoreTimeoutError(self._where, problem) from exc
        if not isinstance(policy, pb.Policy):  # grpc's mark for the end of a stream
            raise StoreUnavailableError(self._where, "it ended the policy watch")
        return policy

    async def _answer(self, call: Awaitable[_Reply]) -> _Reply:
        with rpc_errors(self._where):
            return await call
