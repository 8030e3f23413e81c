"""Blobs in this process's memory: for tests, benchmarks and throw-away stores."""

import threading
import time
from collections.abc import Iterator, Sequence

from kvferry.cluster.backends.base import Area, BlobReader, BlobWriter, Entry
from kvferry.cluster.blob_name import fan_out
from kvferry.errors import BlobNotFoundError


class _MemoryWriter:
    def __init__(self, backend: "MemoryBackend") -> None:
        self._backend = backend
        self._parts: list[bytes] = []

    def write(self, data: bytes | memoryview) -> None:
        self._parts.append(bytes(data))

    def seal(self) -> None:
        self._parts = [b"".join(self._parts)]

    def publish(self, area: Area, name: str) -> None:
        self._backend.add(area, name, b"".join(self._parts))

    def discard(self) -> None:
        self._parts.clear()


class _MemoryReader:
    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    @property
    def size(self) -> int:
        return len(self._data)

    def read(self, offset: int, length: int) -> memoryview:
        return self._data[offset : offset + length]

    def close(self) -> None:
        return


class MemoryBackend:
    """Nothing outlives the process, and nothing is freed but by deletion."""

    url = "memory://"
    index_path = ":memory:"

    def __init__(self) -> None:
        self._areas: dict[Area, dict[str, tuple[bytes, float]]] = {
            "blobs": {},
            "staged": {},
            "quarantine": {},
        }
        self._lock = threading.Lock()

    def add(self, area: Area, name: str, data: bytes) -> None:
        """Hold ``data`` under ``name``."""
        with self._lock:
            self._areas[area][name] = (data, time.time())

    def open(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""

    def create(self) -> BlobWriter:
        """Begin a blob."""
        return _MemoryWriter(self)

    def reader(self, name: str, area: Area = "blobs") -> BlobReader:
        """Raises: BlobNotFoundError."""
        found = self._areas[area].get(name)
        if found is None:
            raise BlobNotFoundError(name)
        return _MemoryReader(found[0])

    def commit(self, names: Sequence[str]) -> None:
        """Staged blobs become visible."""
        with self._lock:
            staged = self._areas["staged"]
            for name in names:
                if name not in staged:
                    raise BlobNotFoundError(name)
            for name in names:
                self._areas["blobs"][name] = staged.pop(name)

    def rename(self, old: str, new: str) -> None:
        """Raises: BlobNotFoundError."""
        with self._lock:
            blobs = self._areas["blobs"]
            if old not in blobs:
                raise BlobNotFoundError(old)
            blobs[new] = blobs.pop(old)

    def delete(self, name: str, area: Area = "blobs") -> bool:
        """False: it was not there."""
        with self._lock:
            return self._areas[area].pop(name, None) is not None

    def quarantine(self, name: str, reason: str, fan: str = "") -> bool:
        """False: it was not there."""
        with self._lock:
            found = self._areas["blobs"].pop(name, None)
            if found is not None:
                self._areas["quarantine"][f"{name}~{reason}"] = found
            return found is not None

    def fans(self) -> Sequence[str]:
        """Folders that there would be."""
        return sorted({fan_out(name) for name in list(self._areas["blobs"])})

    def entries(self, area: Area, fan: str = "") -> Iterator[Entry]:
        """What is held."""
        for name, (data, modified) in list(self._areas[area].items()):
            if not fan or fan_out(name) == fan:
                yield Entry(name, len(data), modified, fan)

    def charge(self, size: int) -> int:
        """As many as there are."""
        return size

    def overhead_bytes(self) -> int:
        """None."""
        return 0

    def free_bytes(self) -> int | None:
        """Not known."""
        return None
