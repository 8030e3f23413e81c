"""Moments at which hooks shall offload: memory pressure, idleness, sleep (design section 10).

After prefill and at the end of a turn the hooks know by themselves.
"""

import asyncio
from collections import Counter
from collections.abc import Callable

from kvferry.cluster.allocator import release_memory
from kvferry.node.events import EventHub
from kvferry.node.pressure import IdleWatch, PressureWatch, memory_used_share
from kvferry.proto.v1 import coordinator_pb2 as pb

WATCH_INTERVAL_S = 0.5


class Triggers:
    """Watches this machine and tells hooks. Belongs to the event loop.

    Args:
        policy: the one in force; its marks and times hold.
    """

    def __init__(
        self,
        hub: EventHub,
        idle: IdleWatch,
        policy: Callable[[], pb.Policy],
        counters: Counter[str],
    ) -> None:
        self._hub, self._idle, self._policy, self._counters = hub, idle, policy, counters
        self._pressure = PressureWatch()

    async def watch(self) -> None:
        """Tell hooks of memory pressure and idleness, for ever."""
        named = False
        while True:
            policy = self._policy()
            if pb.TRIGGER_MEMORY_PRESSURE not in policy.when:
                named = False
            elif not named:  # for a policy that comes to name it, pressure begins now
                named, self._pressure = True, PressureWatch()
            if self._pressure.update(memory_used_share(), policy.memory_mark):
                self.fire(pb.TRIGGER_MEMORY_PRESSURE)
            if self._idle.update(policy.idle_s):
                self.fire(pb.TRIGGER_IDLE)
                await asyncio.to_thread(release_memory)
            await asyncio.sleep(WATCH_INTERVAL_S)

    def fire(self, trigger: "pb.Trigger.ValueType") -> None:
        """Tell all hooks now."""
        name = pb.Trigger.Name(trigger).removeprefix("TRIGGER_").lower()
        self._counters[f"trigger_{name}"] += 1
        self._hub.trigger(trigger)
