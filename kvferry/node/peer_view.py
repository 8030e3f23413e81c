"""What other nodes are served: this node's own blobs, read only, never passed on."""

import builtins
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

from kvferry.cluster.repository import (
    BlobInfo,
    BlobRepository,
    GetSession,
    ListQuery,
    LookupQuery,
    LookupResult,
    PutSession,
    PutSpec,
    RepositoryStat,
    ScrubReport,
)
from kvferry.cluster.throttle import Throttle
from kvferry.errors import ProtocolError
from kvferry.node.local_lookup import look_up_locally
from kvferry.node.tiers import Tiers
from kvferry.proto.keys import BlobKey

# At a bounded rate, pieces of this size go one after the other.
PIECE_BYTES = 64 * 1024


class PeerView:
    """A `BlobRepository` that only reads.

    Args:
        inner: asked for blobs with ``local_only``.
        read: called with the key of every blob that is sent.
        throttle: of all that is sent to peers together.
    """

    def __init__(
        self,
        inner: BlobRepository,
        tiers: Tiers,
        counters: Counter[str],
        read: Callable[[BlobKey], None],
        throttle: Throttle,
    ) -> None:
        self._inner, self._tiers, self._counters = inner, tiers, counters
        self._read, self._throttle = read, throttle

    async def has(self, keys: Sequence[BlobKey]) -> builtins.list[bool]:
        """Which are here."""
        return await self._tiers.has(keys)

    async def open_get(
        self, key: BlobKey, offset: int = 0, length: int = 0, local_only: bool = False
    ) -> GetSession:
        """From this node's tiers only. Raises: BlobNotFoundError."""
        self._counters["peer_requests"] += 1
        session = await self._inner.open_get(key, offset, length, local_only=True)
        self._read(key)
        return GetSession(session.size, session.source, self._paced(session))

    async def _paced(self, session: GetSession) -> AsyncIterator[bytes | memoryview]:
        async for chunk in session.chunks:
            view = memoryview(chunk)
            step = PIECE_BYTES if self._throttle.bytes_per_s else max(1, len(view))
            for at in range(0, len(view), step):
                piece = view[at : at + step]
                await self._throttle.take(len(piece))
                self._counters["sent_bytes_peer"] += len(piece)
                yield piece

    async def lookup(self, query: LookupQuery) -> LookupResult:
        """What is here."""
        return await look_up_locally(self._tiers, query)

    async def list(self, query: ListQuery) -> AsyncIterator[Sequence[BlobInfo]]:
        """What is here."""
        yield await self._tiers.list(query)

    async def stat(self) -> RepositoryStat:
        """Of this node."""
        return await self._inner.stat()

    async def open_put(self, spec: PutSpec) -> PutSession | None:
        """Refused: blobs are put to one's own node, or to the store."""
        raise _read_only()

    async def commit(self, keys: Sequence[BlobKey]) -> int:
        """Refused."""
        raise _read_only()

    async def pin(self, keys: Sequence[BlobKey], ttl_s: int) -> tuple[str, int]:
        """Refused."""
        raise _read_only()

    async def unpin(self, lease_id: str) -> bool:
        """Refused."""
        raise _read_only()

    async def delete(self, keys: Sequence[BlobKey]) -> int:
        """Refused."""
        raise _read_only()

    async def scrub(self, repair: bool) -> AsyncIterator[ScrubReport]:
        """Refused."""
        raise _read_only()
        yield  # makes it a generator, as the contract has it


def _read_only() -> ProtocolError:
    return ProtocolError("peers only read from this node")
