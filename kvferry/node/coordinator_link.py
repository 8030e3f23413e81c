"""The node's side of the coordinator: register, heartbeat, say goodbye, follow the policy.

The coordinator may be gone at any time: the node keeps its last policy, peers and salt.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from kvferry.cluster.backoff import Backoff
from kvferry.cluster.coordinator_client import CoordinatorClient
from kvferry.cluster.credentials import PLAINTEXT, Credentials
from kvferry.errors import FencedError, FerryError, StoreUnavailableError
from kvferry.proto.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)

FENCED_WAIT_S = 30.0
GOODBYE_S = 2.0
# Until the coordinator has said how often it wants to hear of us.
FIRST_INTERVAL_S = 2.0

Reply = pb.RegisterReply | pb.HeartbeatReply


class CoordinatorLink:
    """Keeps this node known. Belongs to the event loop.

    Args:
        address: HOST:PORT; empty: not known yet, see `point_at`.
        greet: makes a registration. beat: makes a heartbeat, without ids and number.
        on_reply: takes salt and peers of a registration, or peers and orders of a heartbeat.
        on_policy: takes each policy that is pushed.

    Attributes:
        reachable: whether the last call was answered.
    """

    def __init__(
        self,
        address: str,
        node_id: str,
        incarnation: int,
        greet: Callable[[], pb.RegisterRequest],
        beat: Callable[[], pb.HeartbeatRequest],
        on_reply: Callable[[Reply], Awaitable[None]],
        on_policy: Callable[[pb.Policy], Awaitable[None]],
        credentials: Credentials = PLAINTEXT,
    ) -> None:
        self.reachable = False
        self._credentials = credentials
        self._client = CoordinatorClient(address, credentials=credentials)
        self._node_id, self._incarnation = node_id, incarnation
        self._greet, self._beat = greet, beat
        self._on_reply, self._on_policy = on_reply, on_policy
        self._interval_s, self._sequence = FIRST_INTERVAL_S, 0
        self._told_exo: pb.ExoState | None = None
        self._here, self._nudged = asyncio.Event(), asyncio.Event()
        self._here.set()
        # One message at a time: a goodbye must not be overtaken by a heartbeat.
        self._talking = asyncio.Lock()

    @property
    def client(self) -> CoordinatorClient:
        """To be called through. Raises: StoreUnavailableError where its place is not known."""
        if not self._client.address:
            raise StoreUnavailableError("coordinator", "not found on this network yet")
        return self._client

    async def point_at(self, address: str) -> None:
        """The coordinator is at ``address`` from now on."""
        if address == self._client.address:
            return
        old = self._client
        self._client = CoordinatorClient(address, credentials=self._credentials)
        await old.aclose()
        self.nudge()

    def nudge(self) -> None:
        """Have the next heartbeat sent now."""
        self._nudged.set()

    async def stay_known(self) -> None:
        """Register, then heartbeat for ever; from the start again when forgotten."""
        backoff = Backoff(first_s=0.2, most_s=5.0)
        while True:
            try:
                await self._register()
                backoff = Backoff(first_s=0.2, most_s=min(5.0, self._interval_s / 2))
                while await self._heartbeat():
                    await self._pause(self._interval_s)
            except FencedError as exc:
                self.reachable = True
                log.error("another daemon speaks for %s: %s", self._node_id, exc)
                await self._pause(FENCED_WAIT_S)
            except FerryError as exc:
                if self.reachable:
                    log.warning("coordinator: %s; going on with the last policy", exc)
                self.reachable = False
                await self._pause(backoff.next_s())

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._nudged.wait()
        self._nudged.clear()

    async def _register(self) -> None:
        await self._here.wait()
        async with self._talking:
            if not self._here.is_set():
                return
            request = self._greet()
            request.node_id, request.incarnation = self._node_id, self._incarnation
            reply = await self.client.register(request)
            self.reachable, self._told_exo = True, None
            self._interval_s = max(0.1, reply.heartbeat_interval_ms / 1000)
            await self._on_reply(reply)

    async def _heartbeat(self) -> bool:
        """Whether the coordinator knows us. Waits while this node is away."""
        await self._here.wait()
        async with self._talking:
            if not self._here.is_set():
                return True
            request = self._beat()
            request.node_id, request.incarnation = self._node_id, self._incarnation
            request.sequence = self._next()
            exo = request.exo if request.HasField("exo") else pb.ExoState()
            if exo == self._told_exo:
                request.ClearField("exo")
            reply = await self.client.heartbeat(request)
            self.reachable = True
            if reply.known:
                self._told_exo = exo
                await self._on_reply(reply)
            return reply.known

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence

    async def goodbye(self, phase: "pb.NodePhase.ValueType") -> bool:
        """Say that this node sleeps or ends, and be silent until `back`.

        False: the coordinator did not hear of it; it will notice the silence.
        """
        self._here.clear()
        try:
            async with asyncio.timeout(GOODBYE_S), self._talking:
                request = pb.GoodbyeRequest(
                    node_id=self._node_id,
                    incarnation=self._incarnation,
                    phase=phase,
                    sequence=self._next(),
                )
                await self.client.goodbye(request, timeout_s=GOODBYE_S)
        except (FerryError, TimeoutError) as exc:
            log.info("goodbye not heard: %s", str(exc) or "no answer in time")
            return False
        return True

    def back(self) -> None:
        """This node is there again: speak, at once."""
        self._here.set()
        self.nudge()

    async def follow_policy(self) -> None:
        """Take each policy as it is pushed, for ever."""
        backoff = Backoff(first_s=0.1, most_s=2.0)
        while True:
            try:
                async with aclosing(self.client.watch_policy(self._node_id)) as policies:
                    async for policy in policies:
                        backoff.reset()
                        await self._on_policy(policy)
            except FerryError as exc:
                log.debug("policy watch: %s", exc)
            await asyncio.sleep(backoff.next_s())

    async def report(self, restore: pb.RestoreReport) -> None:
        """Pass a hook's report on; lost where the coordinator is gone."""
        try:
            await self.client.report_restore(restore)
        except FerryError as exc:
            log.debug("report: %s", exc)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._client.aclose()
