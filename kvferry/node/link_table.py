"""This node's links: to each peer ("NAME") and to the "store", as last measured."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from kvferry.node.interfaces import link_kind
from kvferry.node.remotes import Peers, Remote
from kvferry.proto.v1 import coordinator_pb2 as pb


class LinkTable:
    """Reads what transfers have measured. Belongs to the event loop.

    Args:
        store: None: there is none.
        kind_of: the kind of the way to HOST:PORT; blocks.
    """

    def __init__(
        self, peers: Peers, store: Remote | None, kind_of: Callable[[str], str] = link_kind
    ) -> None:
        self._peers, self._store, self._kind_of = peers, store, kind_of
        self._kinds: Mapping[str, str] = {}

    def remotes(self) -> Sequence[tuple[str, Remote]]:
        """Everything that blobs come from or go to."""
        peers = [(peer.name, peer) for peer in self._peers.all]
        return [*peers, ("store", self._store)] if self._store is not None else peers

    async def look(self) -> None:
        """Find out again which way each goes: cables are plugged in and out."""
        addresses = [remote.address for _, remote in self.remotes() if remote.address]
        self._kinds = await asyncio.to_thread(
            lambda: {address: self._kind_of(address) for address in addresses}
        )

    def samples(self) -> list[pb.LinkSample]:
        """What is known of each, for heartbeats and people."""
        now = time.monotonic()
        return [
            pb.LinkSample(
                to=name,
                bytes_per_s=remote.bytes_per_s,
                latency_s=remote.latency_s,
                kind=self._kinds.get(remote.address, ""),
                age_s=max(now - remote.measured_s, 1e-3) if remote.measured_s else 0.0,
                probed=remote.probed,
            )
            for name, remote in self.remotes()
        ]
