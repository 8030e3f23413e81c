"""How a node goes: to sleep, drained, or for good. Nothing that only it has is left behind.

Hooks are told to offload, what was accepted is uploaded, sole copies are handed over, and
the coordinator is told at once, so that nobody waits for a heartbeat that does not come.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Literal

from kvferry.node.coordinator_link import CoordinatorLink
from kvferry.node.events import EventHub
from kvferry.node.nap import Nap
from kvferry.node.pending_blobs import PendingBlobs
from kvferry.node.repository import NodeRepository
from kvferry.node.triggers import Triggers
from kvferry.proto.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)

# Hooks that offload before the end put again within this time.
QUIET_S = 0.5
LOOK_S = 0.5
CALLED_OFF_S = 60.0
AGAIN_S = 2.0
MAX_ORDERS = 16

Order = Literal["sleep", "wake", "drain", "stay"]


class Departure:
    """Obeys one order at a time; a later one ends the one before. Belongs to the event loop.

    Args:
        limit_s: that hooks and uploads get before sleep and at the end.
        activity: grows whenever a hook asks for something.

    Attributes:
        link: to the coordinator, where there is one.
        draining: nothing new is taken. drained: and nothing is left that only this node has.
    """

    def __init__(
        self,
        hub: EventHub,
        triggers: Triggers,
        repository: NodeRepository,
        pending: PendingBlobs,
        limit_s: float,
        activity: Callable[[], int],
    ) -> None:
        self._hub, self._triggers, self._repository = hub, triggers, repository
        self._pending, self._limit_s, self._activity = pending, limit_s, activity
        self._orders: asyncio.Queue[Order] = asyncio.Queue(MAX_ORDERS)
        self.link: CoordinatorLink | None = None
        self.draining = self.drained = False

    @property
    def phase(self) -> "pb.NodePhase.ValueType":
        """What heartbeats say of it."""
        return pb.NODE_PHASE_DRAINING if self.draining else pb.NODE_PHASE_READY

    def order(self, order: Order) -> None:
        """Take an order, from a signal handler too; one too many is left out."""
        if not self._orders.full():
            self._orders.put_nowait(order)

    def wanted(self, drain: bool) -> None:
        """What the coordinator's last answer wants of this node."""
        if drain != self.draining:
            self.order("drain" if drain else "stay")

    async def run(self) -> None:
        """Obey, for ever."""
        async with asyncio.TaskGroup() as tasks:
            doing: asyncio.Task[None] | None = None
            while True:
                order = await self._orders.get()
                if (order == "drain" and self.draining) or (order == "stay" and not self.draining):
                    continue
                if doing is not None:
                    doing.cancel()
                    await asyncio.wait([doing])
                doing = tasks.create_task(self._obey(order))

    async def _obey(self, order: Order) -> None:
        if order == "sleep":
            await self._sleep()
        if order == "stay":
            self._stay()
        if order == "drain":
            self.draining = True
            log.info("draining: nothing new is taken")
        if self.link is not None:
            self.link.back()
        if self.draining and not self.drained:
            await self._drain()

    async def _sleep(self) -> None:
        # Said first: the machine may not wait for what comes after.
        if self.link is not None:
            await self.link.goodbye(pb.NODE_PHASE_AWAY)
        await self.offload()
        log.info("ready to sleep")
        nap, before = Nap(time.monotonic, time.time, CALLED_OFF_S), self._activity()
        while not (why := nap.over(self._activity() != before)):  # noqa: ASYNC110 - a clock, not an event
            await asyncio.sleep(LOOK_S)
        log.info("awake: %s", why)

    def _stay(self) -> None:
        self.draining = self.drained = False
        self._repository.uploads.reopen()
        log.info("wanted back: taking blobs again")

    async def _drain(self) -> None:
        await self._ask_hooks()
        self._repository.uploads.close()
        while not await self._handed_over():  # noqa: ASYNC110 - tries again
            await asyncio.sleep(AGAIN_S)
        self.drained = True
        log.info("drained")
        if self.link is not None:
            self.link.nudge()

    async def _handed_over(self) -> bool:
        """Whether nothing is left here that is nowhere else; waits a while for it."""
        return not (await self._repository.hand_over(self._limit_s)).left

    async def offload(self) -> None:
        """What hooks still have, then uploads and sole copies, all within the limit.

        Where the store does not answer, it is not waited for: the journal has everything.
        """
        end = time.monotonic() + self._limit_s
        await self._ask_hooks()
        await self._upload(end)

    async def _ask_hooks(self) -> None:
        if self._hub.watchers:
            self._triggers.fire(pb.TRIGGER_BEFORE_SLEEP)
            await self._repository.uploads.quiet(QUIET_S, self._limit_s / 2)

    async def _upload(self, end: float) -> None:
        await self._repository.hand_over(max(0.0, end - time.monotonic()))

    async def finish(self) -> None:
        """The daemon ends: as `offload`, then nothing more is taken, and all is told so."""
        end = time.monotonic() + self._limit_s
        await self._ask_hooks()
        self._repository.uploads.close()
        await self._upload(end)
        await self._pending.save()
        if self.link is not None:
            await self.link.goodbye(pb.NODE_PHASE_GONE)
