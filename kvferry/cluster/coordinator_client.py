"""What nodes and commands call on the coordinator, with deadlines and our errors."""

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar

import grpc
import grpc.aio

from kvferry.cluster.channel import open_channel
from kvferry.cluster.credentials import PLAINTEXT, Credentials
from kvferry.cluster.leader_search import LeaderSearch, parse_addresses
from kvferry.cluster.status import rpc_errors
from kvferry.cluster.wire import MAX_REQUEST_BYTES
from kvferry.errors import (
    FerryError,
    NotLeaderError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from kvferry.proto.v1 import coordinator_pb2 as pb
from kvferry.proto.v1.coordinator_pb2_grpc import CoordinatorStub

if TYPE_CHECKING:
    from kvferry.proto.v1.coordinator_pb2_grpc import CoordinatorAsyncStub

REQUEST_TIMEOUT_S = 5.0
# The coordinator repeats the policy every `REPEAT_S`, so silence means that it is gone.
REPEAT_S = 15.0
WATCH_SILENCE_S = 45.0
# Between rounds over all addresses, while a new leader is being elected.
ROUND_PAUSE_S = 0.2
MIN_ATTEMPT_S = 1.0

_Reply = TypeVar("_Reply")
_Watch: TypeAlias = "grpc.aio.UnaryStreamCall[pb.WatchPolicyRequest, pb.Policy]"


class CoordinatorClient:
    """The leading coordinator, at one of HOST:PORT[,HOST:PORT...]; connects when first used.

    No address will do until one is known; every call fails then.

    With several addresses a call that fails, or that a standby answers, goes on to the next
    until its time is over, so that it outlasts an election. Answers of an older term than
    one that was heard before are refused.

    Usable from one event loop. Raises in every call, beside what is named there:
    StoreUnavailableError, StoreTimeoutError, NotLeaderError, ProtocolError; the
    constructor ConfigError for too many addresses.
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
        self._search = LeaderSearch(parse_addresses(address))
        self._timeout_s = timeout_s
        self._credentials = credentials
        self._replaced = asyncio.Event()  # set when a leader with a later term is heard
        self._channels: dict[str, tuple[grpc.aio.Channel, CoordinatorAsyncStub]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all channels; calls under way fail with StoreUnavailableError."""
        self._search.closed = True
        for channel, _ in self._channels.values():
            await channel.close()

    @property
    def term(self) -> int:
        """The latest term heard; 0: none, or a coordinator that is alone."""
        return self._search.term

    async def register(self, request: pb.RegisterRequest) -> pb.RegisterReply:
        """Join, or join again: salt of the namespace, peers, heartbeat interval.

        Raises: FencedError where a later incarnation of this node id has registered.
        """
        told = pb.RegisterRequest()
        told.CopyFrom(request)
        told.term = self.term
        return await self._call(lambda stub, s: stub.Register(told, timeout=s))

    async def heartbeat(self, request: pb.HeartbeatRequest) -> pb.HeartbeatReply:
        """``known`` false: the coordinator has forgotten this node, register again.

        Raises: FencedError as `register`.
        """
        return await self._call(lambda stub, s: stub.Heartbeat(request, timeout=s))

    async def goodbye(self, request: pb.GoodbyeRequest, *, timeout_s: float | None = None) -> None:
        """Say that this node sleeps, or ends. Raises: FencedError as `register`."""
        await self._call(lambda stub, s: stub.Goodbye(request, timeout=s), timeout_s)

    async def drain(self, node_id: str, *, undo: bool = False) -> pb.DrainReply:
        """Have a node hand over and take nothing new; ``undo``: have it back at work.

        Raises: ConfigError: no such member.
        """
        request = pb.DrainRequest(node_id=node_id, undo=undo)
        return await self._call(lambda stub, s: stub.Drain(request, timeout=s))

    async def watch_policy(self, node_id: str) -> AsyncGenerator[pb.Policy, None]:
        """The policy in force at once, then each later one. Never ends by itself.

        Whoever iterates comes back after an error. Versions never go back, also over
        restarts and changes of the coordinator.

        Raises: StoreUnavailableError also when the coordinator ends the stream.
        """
        request = pb.WatchPolicyRequest(node_id=node_id)
        opened: list[tuple[_Watch, str]] = []

        async def open_watch(stub: "CoordinatorAsyncStub", timeout_s: float) -> pb.Policy:
            while opened:
                opened.pop()[0].cancel()
            opened.append((stub.WatchPolicy(request), self._search.address))
            return await self._next(*opened[-1], timeout_s)

        try:
            policy, seen = await self._call(open_watch), 0
            call, address = opened[-1]
            while True:
                term = policy.term
                if policy.version > seen:
                    seen = policy.version
                    policy.term = 0  # heard; not a part of what was decided
                    yield policy
                try:
                    policy = await self._next(call, address, WATCH_SILENCE_S, term)
                    self._heard(address, policy.term)
                except StoreUnavailableError as exc:
                    self._search.failed(address, exc)
                    raise
        finally:
            for call, _ in opened:
                call.cancel()

    async def report_restore(self, report: pb.RestoreReport) -> None:
        """Tell how a restore went; for metrics, and later for decisions."""
        await self._call(lambda stub, s: stub.ReportRestore(report, timeout=s))

    async def explain(self, layers: int, model_id: bytes = b"", node: str = "") -> pb.ExplainReply:
        """The policy in force, and for each of ``layers`` why it is coded as it is.

        Args:
            node: as this one codes them; empty: as nodes do that no rule names.
        """
        request = pb.ExplainRequest(layers=layers, model=model_id.hex(), node=node)
        return await self._call(lambda stub, s: stub.Explain(request, timeout=s))

    async def set_policy(self, policy: pb.Policy) -> int:
        """Put ``policy`` in force; the version that it got.

        Raises: ConfigError for a policy that the coordinator refuses. After
        StoreUnavailableError it may be in force or not: ask `explain`.
        """
        request = pb.SetPolicyRequest(policy=policy)
        return int((await self._call(lambda stub, s: stub.SetPolicy(request, timeout=s))).version)

    async def members(self) -> pb.MembersReply:
        """Who is registered, in which state, and their last heartbeats."""
        return await self._call(lambda stub, s: stub.Members(pb.MembersRequest(), timeout=s))

    async def leadership(self) -> dict[str, pb.LeadershipReply | FerryError]:
        """What each configured coordinator says of itself, standbys too, or why it does not."""

        async def one(address: str) -> pb.LeadershipReply | FerryError:
            stub = self._stub(address)
            try:
                with rpc_errors(self._where(address)):
                    request = pb.LeadershipRequest()
                    return await stub.Leadership(request, timeout=self._timeout_s)
            except FerryError as exc:
                return exc

        addresses = parse_addresses(self.address)
        return dict(zip(addresses, await asyncio.gather(*map(one, addresses)), strict=True))

    # -- one call, over the coordinators ----------------------------------------------

    async def _call(
        self,
        ask: "Callable[[CoordinatorAsyncStub, float], Awaitable[_Reply]]",
        timeout_s: float | None = None,
    ) -> _Reply:
        loop, search = asyncio.get_running_loop(), self._search
        attempt_s = self._timeout_s if timeout_s is None else timeout_s
        end = loop.time() + attempt_s
        if search.several:
            attempt_s = max(MIN_ATTEMPT_S, attempt_s / search.round)
        tried = 0
        while True:
            address = search.address
            try:
                left = max(0.001, min(attempt_s, end - loop.time()))
                with rpc_errors(self._where(address)):
                    reply = await ask(self._stub(address), left)
                self._heard(address, getattr(reply, "term", 0))
                return reply
            except StoreUnavailableError as exc:
                search.failed(address, exc)
                tried += 1
                pause = ROUND_PAUSE_S * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load
                if not search.again or loop.time() + pause > end:
                    if isinstance(exc, NotLeaderError):
                        raise NotLeaderError(self._where(self.address), exc.leader) from exc
                    raise
                if tried % search.round == 0:
                    await asyncio.sleep(pause)

    def _stub(self, address: str) -> "CoordinatorAsyncStub":
        if address not in self._channels:
            channel = open_channel(address, MAX_REQUEST_BYTES, self._credentials)
            self._channels[address] = channel, CoordinatorStub(channel)
        return self._channels[address][1]

    @staticmethod
    def _where(address: str) -> str:
        return f"coordinator {address}"

    def _heard(self, address: str, term: int) -> None:
        """Raises: NotLeaderError for an old term. Watches at older leaders end."""
        before = self._search.term
        self._search.heard(self._where(address), term)
        if self._search.term > before:
            replaced, self._replaced = self._replaced, asyncio.Event()
            replaced.set()

    async def namespaces(self, name: str = "") -> dict[str, int]:
        """Names of namespaces, and the tags that blobs carry for them.

        ``name``: this one too, if there is one of the name. Raises: ConfigError: no name.
        """
        request = pb.NamespacesRequest(name=name)
        reply = await self._call(lambda stub, s: stub.Namespaces(request, timeout=s))
        return {entry.name: entry.tag for entry in reply.namespaces}

    async def _next(
        self, call: _Watch, address: str, silence_s: float, term: int | None = None
    ) -> pb.Policy:
        """The next message; ``term``: of the leader that sends, unless it is not known yet.

        A leader that stands still sends nothing, so another call that hears of a later one
        ends the watch.
        """
        where = self._where(address)
        if term is not None and term < self._search.term:
            raise NotLeaderError(where)
        reading = asyncio.ensure_future(call.read())
        replaced = asyncio.ensure_future(self._replaced.wait())
        waited: set[asyncio.Future[Any]] = {reading} if term is None else {reading, replaced}
        try:
            await asyncio.wait(waited, timeout=silence_s, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                if replaced.done():
                    raise NotLeaderError(where)
                raise StoreTimeoutError(where, f"silent for {silence_s:.0f} s")
            with rpc_errors(where):
                policy = reading.result()
        finally:
            reading.cancel()
            replaced.cancel()
        if not isinstance(policy, pb.Policy):  # grpc's mark for the end of a stream
            raise StoreUnavailableError(where, "it ended the policy watch")
        return policy
