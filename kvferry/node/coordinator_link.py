"""The node's side of the coordinator: register, heartbeat, follow the policy.

The coordinator may be gone at any time: the node keeps its last policy, peers and salt.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from kvferry import __version__
from kvferry.cluster.coordinator_client import CoordinatorClient
from kvferry.errors import FencedError, FerryError
from kvferry.node.backoff import Backoff
from kvferry.proto.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)


class CoordinatorLink:
    """Keeps this node known. Belongs to the event loop.

    Args:
        beat: fills in a heartbeat's measurements.
        on_reply: takes salt and peers of a registration, or peers of a heartbeat.
        on_policy: takes each policy that is pushed.
    """

    def __init__(
        self,
        address: str,
        node_id: str,
        incarnation: int,
        own_address: str,
        beat: Callable[[], pb.HeartbeatRequest],
        on_reply: Callable[[pb.RegisterReply | pb.HeartbeatReply], Awaitable[None]],
        on_policy: Callable[[pb.Policy], Awaitable[None]],
        policy_version: Callable[[], int],
    ) -> None:
        self.client = CoordinatorClient(address)
        self.reachable = False
        self._node_id, self._incarnation, self._own_address = node_id, incarnation, own_address
        self._beat, self._on_reply, self._on_policy = beat, on_reply, on_policy
        self._policy_version = policy_version

    async def stay_known(self) -> None:
        """Register, then heartbeat for ever; from the start again when forgotten."""
        backoff = Backoff(first_s=0.2, most_s=5.0)
        while True:
            try:
                interval_s = await self._register()
                backoff.reset()
                while await self._heartbeat():  # noqa: ASYNC110 - a beat, not a wait
                    await asyncio.sleep(interval_s)
            except FencedError as exc:
                self.reachable = True
                log.error("another daemon speaks for %s: %s", self._node_id, exc)
                await asyncio.sleep(30.0)
            except FerryError as exc:
                if self.reachable:
                    log.warning("coordinator: %s; going on with the last policy", exc)
                self.reachable = False
                await asyncio.sleep(backoff.next_s())

    async def _register(self) -> float:
        reply = await self.client.register(
            pb.RegisterRequest(
                node_id=self._node_id,
                incarnation=self._incarnation,
                address=self._own_address,
                version=__version__,
                policy_version=self._policy_version(),
                shards=self._beat().shards,
            )
        )
        self.reachable = True
        await self._on_reply(reply)
        return max(0.1, reply.heartbeat_interval_ms / 1000)

    async def _heartbeat(self) -> bool:
        request = self._beat()
        request.node_id, request.incarnation = self._node_id, self._incarnation
        reply = await self.client.heartbeat(request)
        if reply.known:
            await self._on_reply(reply)
        return reply.known

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
        await self.client.aclose()
