"""What a hook and its node daemon tell each other while nobody waits: reports and events.

Reports are sent in the background and never fail; events are watched until the connection
closes, and again after the daemon comes back.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from functools import partial

from kvferry.cluster.backoff import Backoff
from kvferry.cluster.status import rpc_errors
from kvferry.errors import FerryError
from kvferry.node.hook_connection import HookConnection
from kvferry.proto.v1 import coordinator_pb2, node_pb2

log = logging.getLogger(__name__)

REPORTS_UNDER_WAY = 32


class HookNews:
    """Reports to the daemon, events from it, and who this hook is wherever the two meet.

    Args:
        name: how the daemon shall call this client.
    """

    def __init__(self, connection: HookConnection, name: str) -> None:
        self._connection, self._name = connection, name
        self._reports: set[asyncio.Task[None]] = set()
        self._shard: coordinator_pb2.ShardInfo | None = None
        self._curve: coordinator_pb2.ModelCurve | None = None

    def introduce(
        self, shard: coordinator_pb2.ShardInfo, curve: coordinator_pb2.ModelCurve | None
    ) -> None:
        """What all reports say from now on; ``curve`` only where the daemon lacks it."""
        self._shard, self._curve = shard, curve

    def report(self, report: node_pb2.HookReport) -> None:
        """Send it in the background; lost where the daemon is not there, or too many wait."""
        if self._connection.closed or len(self._reports) >= REPORTS_UNDER_WAY:
            return
        report.client = self._name
        if self._shard is not None and not report.HasField("shard"):
            report.shard.CopyFrom(self._shard)
        self._connection.thread.run(self._report_later(report))

    def watch(self, on_event: Callable[[node_pb2.NodeEvent], None]) -> None:
        """Call ``on_event`` for each event until the connection closes.

        Raises: StoreUnavailableError: it is closed already.
        """
        self._connection.check_open()
        self._connection.keep(partial(self._watch, on_event))

    async def _report_later(self, report: node_pb2.HookReport) -> None:
        task = asyncio.ensure_future(self._send(report))
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)

    async def _send(self, report: node_pb2.HookReport) -> None:
        stub, timeout_s = self._connection.stub, self._connection.timeout_s
        try:
            with rpc_errors(self._connection.address):
                reply = await stub.Report(report, timeout=timeout_s)
                if reply.curve_wanted and self._curve is not None:
                    told = node_pb2.HookReport(
                        client=self._name, shard=self._shard, curve=self._curve
                    )
                    await stub.Report(told, timeout=timeout_s)
        except FerryError as exc:
            log.debug("report lost: %s", exc)

    async def _watch(self, on_event: Callable[[node_pb2.NodeEvent], None]) -> None:
        backoff = Backoff(first_s=0.1, most_s=5.0)
        while True:
            with contextlib.suppress(FerryError), rpc_errors(self._connection.address):
                request = node_pb2.WatchEventsRequest(client=self._name)
                told = self._shard is None
                async for event in self._connection.stub.WatchEvents(request):
                    backoff.reset()
                    if not told:  # a daemon that started anew knows nothing of this hook
                        told = True
                        shard = node_pb2.HookReport(client=self._name, shard=self._shard)
                        await self._report_later(shard)
                    await asyncio.to_thread(_deliver, on_event, event)
            await asyncio.sleep(backoff.next_s())


def _deliver(on_event: Callable[[node_pb2.NodeEvent], None], event: node_pb2.NodeEvent) -> None:
    try:
        on_event(event)
    except Exception:
        log.exception("the callback for node events failed")
