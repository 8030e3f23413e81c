"""The store and the peers, each behind a breaker: one that is gone costs nothing."""

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence

from kvferry.cluster.backoff import Breaker
from kvferry.cluster.client import BlobStoreClient
from kvferry.cluster.credentials import PLAINTEXT, Credentials
from kvferry.errors import StoreUnavailableError
from kvferry.node.link_meter import FORGET_S, MEASURED_BYTES, LinkMeter, smooth
from kvferry.node.peer_client import PeerClient
from kvferry.node.sources import Source
from kvferry.proto.keys import BlobKey
from kvferry.proto.v1 import coordinator_pb2 as pb

# A peer that the coordinator names no more is remembered for so long: it may be handing
# over what it has, and a laptop that is back soon has lost nothing.
GRACE_S = 600.0
MAX_REMEMBERED = 256


class Remote:
    """One BlobStore elsewhere, and what transfers with it have measured.

    Attributes:
        meter: what comes from there, for the choice among several.
        bytes_per_s: smoothed over transfers in either direction; 0: none was large enough yet.
        latency_s: smoothed over short questions.
        measured_s: time.monotonic() when bandwidth was measured; 0: never.
        probed: it was measured by a probe, not by a blob.
        under_way: transfers going on now.
        incarnation: of the daemon there; 0: not known.
    """

    def __init__(
        self,
        name: str,
        address: str,
        timeout_s: float,
        max_blob_bytes: int,
        credentials: Credentials = PLAINTEXT,
    ) -> None:
        self.name, self.address = name, address
        self._timeout_s, self._max_blob_bytes = timeout_s, max_blob_bytes
        self._credentials = credentials
        self.client = self._connect()
        self.breaker = Breaker(most_s=5.0)
        self.meter = LinkMeter(on_rate=self.measured)
        self.bytes_per_s = 0.0
        self.latency_s = 0.0
        self.measured_s, self.probed, self.under_way = 0.0, False, 0
        self.incarnation = 0

    def _connect(self) -> BlobStoreClient:
        return BlobStoreClient(
            self.address,
            timeout_s=self._timeout_s,
            max_blob_bytes=self._max_blob_bytes,
            credentials=self._credentials,
        )

    async def point_at(self, address: str) -> None:
        """It is at ``address`` from now on; calls under way fail, and are tried again."""
        if address == self.address:
            return
        old, self.address = self.client, address
        self.client, self.breaker = self._connect(), Breaker(most_s=5.0)
        await old.aclose()

    @property
    def peer(self) -> PeerClient:
        """What it is asked beside blobs, where it is a node."""
        return PeerClient(self.client)

    def source(self, is_store: bool = False) -> Source:
        """How it stands now, for a choice among several."""
        rate = self.meter.bytes_per_s
        if not rate and self.measured_s and time.monotonic() - self.measured_s < FORGET_S:
            rate = self.bytes_per_s
        return Source(self.name, rate, self.latency_s, self.meter.queued_bytes, is_store)

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
            self.latency_s = smooth(self.latency_s, time.monotonic() - started)

    def measured(self, size: int, seconds: float, probed: bool = False) -> None:
        """Take in a transfer; small ones say nothing about bandwidth."""
        if size >= MEASURED_BYTES and seconds > 0:
            self.bytes_per_s = smooth(self.bytes_per_s, size / seconds)
            self.measured_s, self.probed = time.monotonic(), probed

    async def get(
        self,
        key: BlobKey,
        *,
        local_only: bool,
        timeout_s: float,
        on_bytes: Callable[[int], None] | None = None,
    ) -> memoryview:
        """A whole blob, not verified. Raises: as `BlobStoreClient.get`."""
        async with self.asking(short=False):
            return await self.client.get(
                key, verify=False, local_only=local_only, timeout_s=timeout_s, on_bytes=on_bytes
            )

    async def aclose(self) -> None:
        """Close the connection."""
        await self.client.aclose()


class Peers:
    """The other daemons, as the coordinator names them."""

    def __init__(
        self,
        own_id: str,
        timeout_s: float,
        max_blob_bytes: int,
        credentials: Credentials = PLAINTEXT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._own_id, self._timeout_s, self._max = own_id, timeout_s, max_blob_bytes
        self._credentials, self._clock = credentials, clock
        self._peers: dict[str, Remote] = {}
        self._left: dict[str, tuple[Remote, float]] = {}

    @property
    def all(self) -> Sequence[Remote]:
        """Peers known now."""
        return list(self._peers.values())

    @property
    def healthy(self) -> Sequence[Remote]:
        """Those of them that have answered when last asked, or never were."""
        return [peer for peer in self._peers.values() if peer.breaker.healthy]

    def named(self, name: str) -> Remote | None:
        """A peer known now, or until a moment ago."""
        left = self._left.get(name)
        return self._peers.get(name) or (left[0] if left else None)

    async def update(self, addresses: Sequence[pb.NodeAddress], partial: bool = False) -> None:
        """Take over the coordinator's list; connections to peers that stay are kept.

        ``partial``: who is not on it may be there all the same.
        """
        wanted = {a.node_id: a for a in addresses if a.node_id != self._own_id and a.address}
        now = self._clock()
        for name in [name for name in self._peers if name not in wanted and not partial]:
            self._left[name] = self._peers.pop(name), now + GRACE_S
        for name, told in wanted.items():
            peer = self._peers.get(name)
            if peer is None:
                peer = self._left.pop(name, (None, 0.0))[0]
            if peer is not None and peer.address != told.address:
                await peer.aclose()
                peer = None
            if peer is None:
                peer = Remote(name, told.address, self._timeout_s, self._max, self._credentials)
            peer.incarnation = told.incarnation or peer.incarnation
            self._peers[name] = peer
        await self._forget(now)

    async def _forget(self, now: float) -> None:
        """Peers that left long ago, or too many of them."""
        for name in list(self._left):
            if self._left[name][1] <= now or len(self._left) > MAX_REMEMBERED:
                await self._left.pop(name)[0].aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        for peer in [*self._peers.values(), *(peer for peer, _ in self._left.values())]:
            await peer.aclose()
        self._peers.clear()
        self._left.clear()
