"""What an engine must do: opaque bytes under names. It knows no blob format.

Everything here blocks: it is called from worker threads. Names come from
`kvferry.cluster.blob_name` and are validated there, never from the wire as they are.
Errors of the medium are raised as StoreFullError or StoreUnavailableError.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Area = Literal["blobs", "staged", "quarantine"]


@dataclass(frozen=True, slots=True)
class Entry:
    """Something held. ``size`` in bytes; ``fan``: under which it was found."""

    name: str
    size: int
    modified_unix_s: float = 0.0
    fan: str = ""


class BlobWriter(Protocol):
    """One blob being written, seen by nobody until `publish`."""

    def write(self, data: bytes | memoryview) -> None:
        """Append all of ``data``. Raises: StoreFullError, StoreUnavailableError."""

    def seal(self) -> None:
        """Make the bytes durable."""

    def publish(self, area: Area, name: str) -> None:
        """Make it visible under ``name``, atomically and durably. Call after `seal`."""

    def discard(self) -> None:
        """Forget it; does nothing after `publish`; never raises."""


class BlobReader(Protocol):
    """One blob being read; it stays readable although it is deleted meanwhile."""

    @property
    def size(self) -> int:
        """Bytes of the blob."""

    def read(self, offset: int, length: int) -> memoryview:
        """At most ``length`` bytes; fewer only at the end."""

    def close(self) -> None:
        """May be called twice."""


class BlobBackend(Protocol):
    """Bytes by name, in three areas: visible, staged, and set aside."""

    @property
    def url(self) -> str:
        """As given by the user."""

    @property
    def index_path(self) -> str:
        """Where an SQLite index may live; ":memory:" where there is no disk."""

    def open(self) -> None:
        """Take possession; clean up after writers that died.

        Raises: ConfigError: in use by another process, or not writable.
        """

    def close(self) -> None:
        """Let go. May be called twice."""

    def create(self) -> BlobWriter:
        """Begin a blob."""

    def reader(self, name: str, area: Area = "blobs") -> BlobReader:
        """Raises: BlobNotFoundError."""

    def commit(self, names: Sequence[str]) -> None:
        """Staged blobs become visible: all, or none, also when the process dies."""

    def rename(self, old: str, new: str) -> None:
        """Give a visible blob another name. Raises: BlobNotFoundError."""

    def delete(self, name: str, area: Area = "blobs") -> bool:
        """False: it was not there."""

    def quarantine(self, name: str, reason: str, fan: str = "") -> bool:
        """Set a damaged blob aside. False: it was not there.

        ``fan``: where it lies, if that is not where its name says.
        """

    def fans(self) -> Sequence[str]:
        """Values of `fan_out` under which visible blobs may lie, sorted."""

    def entries(self, area: Area, fan: str = "") -> Iterator[Entry]:
        """What lies in an area; for "blobs", under one ``fan``."""

    def charge(self, size: int) -> int:
        """Bytes of the medium that a blob of ``size`` bytes takes."""

    def overhead_bytes(self) -> int:
        """Bytes that the root takes beside blobs: index, folders."""

    def free_bytes(self) -> int | None:
        """Free bytes of the medium; None where that means nothing."""
