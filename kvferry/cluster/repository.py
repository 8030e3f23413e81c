"""What can stand behind the BlobStore service: the store, a node's tiers, a test's dict.

`kvferry.cluster.blob_service` turns a repository into the gRPC service; the client in
`kvferry.cluster.client` has the same verbs on the other side.
"""

import builtins
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvferry.cluster.tag_rule import TagRule
from kvferry.proto.keys import BlobKey


@dataclass(frozen=True, slots=True, kw_only=True)
class PutSpec:
    """What a writer says before the bytes. ``size`` in bytes, ``ttl_s`` 0: no end.

    ``rule``: the namespaces that it may write in, which it does not say itself; None: all.
    """

    key: BlobKey
    size: int
    stage: bool = False
    ttl_s: int = 0
    replaces: BlobKey | None = None
    rule: TagRule | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecInfo:
    """Codec of a stored blob, as its header says."""

    name: str
    version: int
    params_json: str = "{}"
    calibration_id: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobInfo:
    """What an index knows of a blob without its payload.

    ``near``: in a node daemon's lookup, that it holds the blob itself. ``expires_unix_s``
    0: no end. ``namespace_tag``: see `kvferry.proto.keys.namespace_tag`; 0: not told.
    """

    key: BlobKey
    size: int
    codec: CodecInfo
    model_id: bytes
    previous_key: bytes
    tokens: tuple[int, int]
    layers: tuple[int, int]
    heads: tuple[int, int]
    model_layers: int
    model_heads: int
    stored_unix_s: int = 0
    used_unix_s: int = 0
    near: bool = False
    expires_unix_s: int = 0
    namespace_tag: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupQuery:
    """A chain of page keys, and which part of the complete pages to list.

    ``layers`` or ``heads`` of (0, 0) mean all. ``codecs`` empty means any. ``states``:
    layers of states to list, of any head; (0, 0) means none. ``tokens``: no state beyond so
    many is of use; 0: any may be.
    """

    root: bytes
    page_keys: Sequence[bytes]
    codecs: frozenset[str] = frozenset()
    layers: tuple[int, int] = (0, 0)
    heads: tuple[int, int] = (0, 0)
    local_only: bool = False
    states: tuple[int, int] = (0, 0)
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TailFound:
    """A complete tail anchored at the end of the run of complete pages, or a page before."""

    tail_key: bytes
    tokens: int
    blobs: Sequence[BlobInfo]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFound:
    """A complete state anchored anywhere along the chain.

    Attributes:
        key: made from that of a tail of the same tokens.
        pages: how many come before those tokens.
        tokens: how many they are.
    """

    key: bytes
    pages: int
    tokens: int
    blobs: Sequence[BlobInfo]


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupResult:
    """The longest run of complete pages; ``pages[i]`` lists blobs of page i."""

    pages: Sequence[Sequence[BlobInfo]]
    tails: Sequence[TailFound] = ()
    states: Sequence[StateFound] = ()
    partial: bool = False

    @property
    def complete_pages(self) -> int:
        """Pages in the run."""
        return len(self.pages)


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStat:
    """One of the places where a store has blobs: its medium, or what stands before it.

    ``budget_bytes`` 0: its own affair. ``counters``: hits, misses, evictions, failures by
    reason. ``healthy`` False: it has not answered lately.
    """

    name: str
    blobs: int = 0
    bytes: int = 0
    budget_bytes: int = 0
    healthy: bool = True
    counters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceStat:
    """What a namespace holds, in bytes of the medium. ``quota_bytes`` 0: no quota."""

    tag: int
    name: str = ""
    blobs: int = 0
    bytes: int = 0
    quota_bytes: int = 0
    counters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseStat:
    """A lease in force. ``model_id`` is of one of its blobs, ``token_end`` their furthest."""

    lease_id: str
    expires_unix_s: int
    blobs: int = 0
    bytes: int = 0
    model_id: builtins.bytes = b""
    token_end: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryStat:
    """Counts and bytes; ``counters`` are refusals and failures by reason.

    ``version`` and ``unix_s`` (its clock) are of the server that answered.
    """

    blobs: int
    bytes: int
    budget_bytes: int
    in_flight_bytes: int = 0
    pages_complete: int = 0
    quarantined: int = 0
    free_disk_bytes: int = 0
    pinned: int = 0
    backend: str = ""
    counters: Mapping[str, int] = field(default_factory=dict)
    version: str = ""
    unix_s: float = 0.0
    tiers: Sequence[TierStat] = ()
    namespaces: Sequence[NamespaceStat] = ()
    leases: Sequence[LeaseStat] = ()


@dataclass(frozen=True, slots=True)
class ScrubReport:
    """Progress of a scrub, and what was found since the last report.

    Attributes:
        findings: (key, reason) of damaged blobs.
        bytes: read and compared.
        expires: key -> unix time in s at which a damaged blob would have ended.
        mended: key -> who gave a whole copy that is in its place now.
    """

    checked: int
    total: int
    findings: Sequence[tuple[str, str]] = ()
    bytes: int = 0
    expires: Mapping[str, int] = field(default_factory=dict)
    mended: Mapping[str, str] = field(default_factory=dict)


class PutSession(Protocol):
    """One write under way. Exactly one of `finish` and `abort` ends it."""

    async def write(self, chunk: bytes | memoryview) -> None:
        """Raises: StoreFullError, CorruptBlobError (more bytes than announced)."""

    async def finish(self) -> bool:
        """Verify, make durable, make visible unless staged. False: was there already.

        Raises: CorruptBlobError, IdentityMismatchError, StoreFullError.
        """

    async def abort(self) -> None:
        """Forget all that was written; never raises."""


@dataclass(frozen=True, slots=True)
class GetSession:
    """One read under way: ``size`` of the whole blob, and the bytes asked for.

    ``expires_unix_s`` 0: no end, or not known.
    """

    size: int
    source: str
    chunks: AsyncIterator[bytes | memoryview]
    expires_unix_s: int = 0


class BlobRepository(Protocol):
    """Blobs by key. A reader never sees a partial or unverified put."""

    async def has(self, keys: Sequence[BlobKey]) -> list[bool]:
        """Which are committed, in the order asked."""

    async def open_put(self, spec: PutSpec) -> PutSession | None:
        """None: the key is there already. Raises: StoreFullError, QueueFullError."""

    async def open_get(
        self, key: BlobKey, offset: int = 0, length: int = 0, local_only: bool = False
    ) -> GetSession:
        """``length`` 0: to the end. Raises: BlobNotFoundError, StoreUnavailableError."""

    async def commit(self, keys: Sequence[BlobKey]) -> int:
        """Make staged blobs visible, all or none. Raises: BlobNotFoundError."""

    async def lookup(self, query: LookupQuery) -> LookupResult:
        """Longest run of pages whose committed blobs cover all layers and heads."""

    async def pin(self, keys: Sequence[BlobKey], ttl_s: int) -> tuple[str, int]:
        """A lease against eviction: (lease id, how many of the keys are held)."""

    async def unpin(self, lease_id: str) -> bool:
        """End a lease. False: it was over already."""

    async def delete(self, keys: Sequence[BlobKey]) -> int:
        """How many were there."""

    def list(self, query: "ListQuery") -> AsyncIterator[Sequence[BlobInfo]]:
        """Batches of what is held, oldest use first."""

    async def stat(self) -> RepositoryStat:
        """Counts and bytes."""

    def scrub(self, repair: bool) -> AsyncIterator[ScrubReport]:
        """Read and verify everything; with ``repair`` damaged blobs are set aside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListQuery:
    """Filters of `BlobRepository.list`; empty or 0: not filtered.

    ``previous_key``: what hangs on this page or root. A repository may leave that one out
    of account; whoever asks looks again.
    """

    page_key: bytes = b""
    model_id: bytes = b""
    kind: str = ""
    limit: int = 0
    previous_key: bytes = b""
