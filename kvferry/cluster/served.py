"""What a store process needs of a repository beside its verbs."""

from typing import Protocol, runtime_checkable

from kvferry.cluster.repository import BlobRepository, RepositoryStat


class OwnedRepository(BlobRepository, Protocol):
    """One that was opened, and must be closed."""

    async def aclose(self) -> None:
        """Let go of everything. May be called twice."""


@runtime_checkable
class ServedStore(OwnedRepository, Protocol):
    """One that a store process serves."""

    def stat_now(self) -> RepositoryStat:
        """As `stat`, blocking, from any thread: for metrics."""

    async def run_maintenance(self, interval_s: float = 5.0) -> None:
        """Expiry and housekeeping, until cancelled."""
