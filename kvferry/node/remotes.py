"""The store and the peers, each behind a breaker: one that is gone costs nothing."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence

from kvferry.cluster.client import BlobStoreClient
from kvferry.errors import StoreUnavailableError
from kvferry.node.backoff import Breaker
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import coordinator_pb2 as pb

log = logging.getLogger(__name__)

SMOOTHING = 0.3
MEASURED_BYTES = 64 * 1024


class Remote:
    """One BlobStore elsewhere, and what transfers with it have measured.

    Attributes:
        bytes_per_s: smoothed over real transfers; 0: none was large enough yet.
        latency_s: smoothed over short questions.
        measured_s: time.monotonic() when bandwidth was measured; 0: never.
        probed: it was measured by a probe, not by a blob.
        under_way: transfers going on now.
    """

    def __init__(self, name: str, address: str, timeout_s: float, max_blob_bytes: int) -> None:
        self.name, self.address = name, address
        self._timeout_s, self._max_blob_bytes = timeout_s, max_blob_bytes
        self.client = self._connect()
        self.breaker = Breaker(most_s=5.0)
        self.bytes_per_s = 0.0
        self.latency_s = 0.0
        self.measured_s, self.probed, self.under_way = 0.0, False, 0

    def _connect(self) -> BlobStoreClient:
        return BlobStoreClient(
            self.address, timeout_s=self._timeout_s, max_blob_bytes=self._max_blob_bytes
        )

    async def point_at(self, address: str) -> None:
        """It is at ``address`` from now on; calls under way fail, and are tried again."""
        if address == self.address:
            return
        old, self.address = self.client, address
        self.client, self.breaker = self._connect(), Breaker(most_s=5.0)
        await old.aclose()

    @contextlib.asynccontextmanager
    async def asking(self, short: bool = True) -> AsyncIterator[None]:
        """Count what happens inside for the breaker. ``short``: measure latency by it.

        Raises: StoreUnavailableError at once where the remote has not answered lately.
        """
        if not self.address:
            raise StoreUnavailableError(self.name, "not found on this network yet")
        if not self.breaker.allow():
            raise StoreUnavailableError(self.name, "it has not answered lately")
        started = time.monotonic()
        self.under_way += not short
        try:
            yield
        except StoreUnavailableError:
            self.breaker.failed()
            raise
        except Exception:
            self.breaker.succeeded()  # a refusal is an answer
            raise
        finally:
            self.under_way -= not short
        self.breaker.succeeded()
        if short:
            self.latency_s = _smooth(self.latency_s, time.monotonic() - started)

    def measured(self, size: int, seconds: float, probed: bool = False) -> None:
        """Take in a transfer; small ones say nothing about bandwidth."""
        if size >= MEASURED_BYTES and seconds > 0:
            self.bytes_per_s = _smooth(self.bytes_per_s, size / seconds)
            self.measured_s, self.probed = time.monotonic(), probed

    async def get(self, key: BlobKey, *, local_only: bool, timeout_s: float) -> memoryview:
        """A whole blob, its digest verified. Raises: as `BlobStoreClient.get`."""
        started = time.monotonic()
        async with self.asking(short=False):
            data = await self.client.get(key, local_only=local_only, timeout_s=timeout_s)
        self.measured(len(data), time.monotonic() - started)
        return data

    async def aclose(self) -> None:
        """Close the connection."""
        await self.client.aclose()


class Peers:
    """The other daemons, as the coordinator names them. Who has what is asked on use."""

    def __init__(self, own_id: str, timeout_s: float, max_blob_bytes: int) -> None:
        self._own_id, self._timeout_s, self._max = own_id, timeout_s, max_blob_bytes
        self._peers: dict[str, Remote] = {}

    @property
    def all(self) -> Sequence[Remote]:
        """Peers known now."""
        return list(self._peers.values())

    async def update(self, addresses: Sequence[pb.NodeAddress], partial: bool = False) -> None:
        """Take over the coordinator's list; connections to peers that stay are kept.

        ``partial``: who is not on it may be there all the same.
        """
        wanted = {
            a.node_id: a.address for a in addresses if a.node_id != self._own_id and a.address
        }
        if partial:
            wanted = {name: peer.address for name, peer in self._peers.items()} | wanted
        gone = [peer for name, peer in self._peers.items() if wanted.get(name) != peer.address]
        for peer in gone:
            del self._peers[peer.name]
            await peer.aclose()
        for name, address in wanted.items():
            if name not in self._peers:
                self._peers[name] = Remote(name, address, self._timeout_s, self._max)

    async def holders(self, key: BlobKey) -> list[Remote]:
        """Peers that say they hold ``key``; those that do not answer in time are left out."""

        async def ask(peer: Remote) -> bool:
            async with peer.asking():
                return (await peer.client.has([key], timeout_s=self._timeout_s))[0]

        peers = self.all
        answers = await asyncio.gather(*(ask(peer) for peer in peers), return_exceptions=True)
        return [peer for peer, held in zip(peers, answers, strict=True) if held is True]

    async def aclose(self) -> None:
        """Close all connections."""
        await self.update([])


def _smooth(old: float, new: float) -> float:
    return new if not old else old + SMOOTHING * (new - old)
