"""How much a store may hold: one hard budget over everything under its root."""

from dataclasses import dataclass

from kvferry.cluster.backends.base import BlobBackend
from kvferry.proto.container import DEFAULT_LIMITS

# What one transaction may add to the index and its log before they are measured again.
INDEX_SLACK_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """Bounds of a store.

    Attributes:
        budget_bytes: of the whole root: blobs, staged and damaged ones, index, and what
            is being written.
        reserve_bytes: of the file system, left free whatever the budget says.
        max_blob_bytes: of one blob.
        staged_ttl_s: a blob staged and not committed for so long is dropped.
        use_grain_s: uses are noted to this many seconds; within them the end of a
            chain counts as used before its beginning, so that it is evicted first.
        max_age_s: of a shared bucket: pages that nobody used for so long go; 0: none.
        sweep_s: of a shared bucket: between two sweeps.
    """

    budget_bytes: int
    reserve_bytes: int = 0
    max_blob_bytes: int = DEFAULT_LIMITS.max_blob
    staged_ttl_s: float = 600.0
    use_grain_s: int = 60
    max_age_s: float = 0.0
    sweep_s: float = 60.0


class Space:
    """The sums. Not locked: its owner's lock guards it. All in bytes of the medium."""

    def __init__(self, backend: BlobBackend, limits: StoreLimits) -> None:
        self._backend, self._limits = backend, limits
        self._slack = 0 if backend.index_path == ":memory:" else INDEX_SLACK_BYTES
        self.committed = 0
        self.staged = 0
        self.quarantined = 0
        self.in_flight = 0

    @property
    def used(self) -> int:
        """Everything that counts against the budget."""
        blobs = self.committed + self.staged + self.quarantined + self.in_flight
        return blobs + self._backend.overhead_bytes() + self._slack

    def shortfall(self, more: int) -> int:
        """Bytes that must go before ``more`` fit; 0 or less: they fit."""
        over = self.used + more - self._limits.budget_bytes
        free = self._backend.free_bytes()
        if free is None:
            return over
        # Writes in flight have not all reached the medium: count them whole.
        return max(over, self._limits.reserve_bytes + self.in_flight + more - free)

    def free(self) -> int:
        """Bytes that would fit now without eviction."""
        return max(0, -self.shortfall(0))
