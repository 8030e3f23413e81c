"""Events for hooks: each subscriber has a short queue and never holds up the others."""

import asyncio
from collections.abc import AsyncIterator

from kvferry.proto.v1 import coordinator_pb2, node_pb2

QUEUE_LENGTH = 64


class EventHub:
    """Publishes `NodeEvent`s to whoever watches. Belongs to the event loop."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[node_pb2.NodeEvent | None]] = set()
        self._closed = False

    @property
    def watchers(self) -> int:
        """How many watch."""
        return len(self._queues)

    def publish(self, event: node_pb2.NodeEvent) -> None:
        """To all. A watcher that is too slow loses its oldest event."""
        for queue in self._queues:
            _push(queue, event)

    def trigger(self, trigger: "coordinator_pb2.Trigger.ValueType") -> None:
        """Publish a trigger."""
        self.publish(node_pb2.NodeEvent(trigger=trigger))

    def close(self) -> None:
        """End every watch."""
        self._closed = True
        for queue in self._queues:
            _push(queue, None)

    async def watch(self, *first: node_pb2.NodeEvent) -> AsyncIterator[node_pb2.NodeEvent]:
        """``first``, then all that is published from now on, until `close`."""
        queue: asyncio.Queue[node_pb2.NodeEvent | None] = asyncio.Queue(QUEUE_LENGTH)
        self._queues.add(queue)
        try:
            for event in first:
                yield event
            while not self._closed or not queue.empty():
                event_or_end = await queue.get()
                if event_or_end is None:
                    return
                yield event_or_end
        finally:
            self._queues.discard(queue)


def _push(
    queue: "asyncio.Queue[node_pb2.NodeEvent | None]", event: node_pb2.NodeEvent | None
) -> None:
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(event)
