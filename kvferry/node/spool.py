"""Blobs of a daemon without a disk tier, put on disk when it stops before their upload."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from kvferry.cluster.blob_name import blob_name
from kvferry.cluster.durable import private_folder, write_durably
from kvferry.errors import BlobNotFoundError, StoreFullError
from kvferry.proto.keys import BlobKey


class Spool:
    """One file a blob. Blocks; usable from any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, key: BlobKey) -> Path:
        return self._folder / blob_name(key)

    def write(self, key: BlobKey, data: bytes | memoryview) -> None:
        """On disk when this returns. Raises: StoreFullError."""
        private_folder(self._folder)
        try:
            write_durably(self._path(key), data)
        except OSError as exc:
            raise StoreFullError(f"spool {self._folder}", len(data), 0) from exc

    def read(self, key: BlobKey) -> bytes:
        """Raises: BlobNotFoundError."""
        try:
            return self._path(key).read_bytes()
        except OSError as exc:
            raise BlobNotFoundError(str(key)) from exc

    def has(self, key: BlobKey) -> bool:
        """Whether it is there."""
        return self._path(key).is_file()

    def remove(self, key: BlobKey) -> None:
        """Does nothing where it is not there."""
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def keep_only(self, keys: Sequence[BlobKey]) -> None:
        """Remove every file that is none of these: left by a crash between two steps."""
        names = {blob_name(key) for key in keys}
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                if path.name not in names:
                    path.unlink(missing_ok=True)
